package locker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// hold lets another program hold the key for a time.
func (s *spy) hold(t *testing.T, d time.Duration) {
	t.Helper()
	_, err := s.store.Locker().Acquire(t.Context(), locker.Request{Key: "k", ID: "other", TTL: d, Holder: "other program"})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRequestSaysWhatTheOptionsSay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithHolder("nightly job"))
		l, err := c.Acquire(t.Context(), "k", locker.WithNoWait(), locker.WithTTL(time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		req := s.seen("acquire")[0].req
		if len(req.ID) != 36 || req.ID[14] != '7' || req.Lost == nil {
			t.Errorf("ID %q is no UUIDv7, or Lost is missing", req.ID)
		}
		id := req.ID
		req.ID, req.Lost = "", nil
		equal(t, "request", req, locker.Request{Key: "k", TTL: time.Minute, NoWait: true, Holder: "nightly job"})
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "released by its ID", s.seen("release")[0].lease.ID, id)
		acquire(t, c)
		if again := s.seen("acquire")[1].req.ID; again == id {
			t.Error("two requests have the same ID")
		}
	})
}

// What a failed acquire may have left at the server is withdrawn by exactly Release(Lease{Key, ID}), until that is answered.
func TestFailedAcquireIsWithdrawn(t *testing.T) {
	for _, c := range []struct {
		name     string
		acquire  fate
		releases []fate
		opts     []locker.Option
		matches  []error
		never    []error
		tries    int // to withdraw
	}{
		{name: "refused", acquire: refused, matches: []error{errRefused}, tries: 1},
		{name: "answer lost", acquire: reset, tries: 1, never: []error{locker.ErrHeld}},
		{
			name: "answer lost, and that of its withdrawal too", acquire: reset,
			releases: []fate{refused, reset}, tries: 3,
		},
		{
			name: "wait over", acquire: swallowed, opts: []locker.Option{locker.WithWait(time.Second)},
			matches: []error{context.DeadlineExceeded}, tries: 1,
		},
		{
			name: "answer after the deadline", acquire: deaf(0, trust), tries: 1,
			never: []error{locker.ErrLost, locker.ErrHeld},
		},
		{
			name: "a network's timeout instead of the ctx's", opts: []locker.Option{locker.WithWait(time.Second)}, tries: 1,
			acquire: func(ctx context.Context, _ func() (locker.Lease, error)) (locker.Lease, error) {
				<-ctx.Done()
				return locker.Lease{}, errRefused
			},
			matches: []error{context.DeadlineExceeded, errRefused},
		},
		{name: "held, but waited", acquire: answers(locker.ErrHeld), matches: []error{locker.ErrHeld}, tries: 1},
		{name: "held, asked once", acquire: answers(locker.ErrHeld), opts: []locker.Option{locker.WithNoWait()}, matches: []error{locker.ErrHeld}},
		{
			name: "asked once, answer lost", acquire: reset, opts: []locker.Option{locker.WithNoWait()},
			never: []error{locker.ErrHeld}, tries: 1,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s, client := setup(t)
				s.on("acquire", first(c.acquire))
				s.on("release", first(c.releases...))
				l, err := client.Acquire(t.Context(), "k", c.opts...)
				if l != nil || err == nil {
					t.Fatalf("got %v, %v", l, err)
				}
				for _, want := range c.matches {
					if !errors.Is(err, want) {
						t.Errorf("%q does not match %q", err, want)
					}
				}
				for _, wrong := range c.never {
					if errors.Is(err, wrong) {
						t.Errorf("%q matches %q", err, wrong)
					}
				}
				if !strings.HasPrefix(err.Error(), "locker: ") {
					t.Errorf("message: %v", err)
				}
				s.at(s.now() + time.Minute)
				req := s.seen("acquire")[0].req
				equal(t, "tries to withdraw", len(s.seen("release")), c.tries)
				for _, r := range s.seen("release") {
					equal(t, "withdrawn", r.lease, locker.Lease{Key: "k", ID: req.ID})
				}
				equal(t, "extends", len(s.seen("extend")), 0)
				equal(t, "held", len(s.store.Holdings()), 0)
				acquire(t, client)
			})
		})
	}
}

func TestLateGrantWithinTrustIsALock(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("acquire", always(travels(0, trust-1)))
		l := acquire(t, c)
		if err := l.Err(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		equal(t, "renewed at once", s.moments("extend"), []time.Duration{trust - 1})
	})
}

func TestWaitIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, time.Minute)
		_, err := c.Acquire(t.Context(), "k", locker.WithWait(2*time.Second))
		equal(t, "over at", s.now(), 2*time.Second)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, locker.ErrHeld) {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err = c.Acquire(ctx, "k")
		equal(t, "cancelled at", s.now(), 3*time.Second)
		if !errors.Is(err, context.Canceled) || !errors.Is(err, locker.ErrHeld) {
			t.Error(err)
		}
		_, err = c.Acquire(t.Context(), "k", locker.WithNoWait())
		equal(t, "asked at", s.now(), 3*time.Second)
		held, ok := errors.AsType[*locker.HeldError](err)
		if !ok || *held != (locker.HeldError{Key: "k", Holder: "other program", Remaining: 57 * time.Second}) {
			t.Error(err)
		}
		synctest.Wait()
		equal(t, "waiters left", s.store.Holdings()[0].Waiters, 0)
		l, err := c.Acquire(t.Context(), "k", locker.WithWait(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		s.at(2 * time.Hour)
		if err := l.Err(); err != nil {
			t.Error("the wait's bound became the lock's:", err)
		}
	})
}

func TestCtxThatIsDoneSendsNothing(t *testing.T) {
	s, c := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Acquire(ctx, "k"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	equal(t, "requests", len(s.calls), 0)
}

func TestBadRequestsSendNothing(t *testing.T) {
	s, c := setup(t)
	for key, want := range map[string]string{
		"":                           "the key is empty",
		strings.Repeat("x", 513):     "the key has 513 bytes: the most is 512",
		"a\x00b":                     "NUL",
		"\xff":                       "not valid UTF-8",
		strings.Repeat("é", 300):     "the key has 600 bytes",
		"half a rune at the end\xc3": "not valid UTF-8",
	} {
		_, err := c.Acquire(t.Context(), key)
		var bad *locker.Error
		if !errors.As(err, &bad) || bad.Op != "acquire" || bad.Key != key || !strings.Contains(err.Error(), want) {
			t.Errorf("key %.20q: %v", key, err)
		}
	}
	equal(t, "requests", len(s.calls), 0)
	if _, err := c.Acquire(t.Context(), strings.Repeat("x", locker.MaxKeyLength)); err != nil {
		t.Error("the longest key:", err)
	}
}

func TestNewRefusesNil(t *testing.T) {
	if c, err := locker.New(nil); c != nil || err == nil || err.Error() != "locker: open: the Locker is nil" {
		t.Errorf("got %v, %v", c, err)
	}
	if c, err := locker.New(membackend.New(), nil); c != nil || err == nil || err.Error() != "locker: open: option 1 is nil" {
		t.Errorf("got %v, %v", c, err)
	}
}

func TestInspect(t *testing.T) {
	back := membackend.New()
	c := newClient(t, back)
	l := acquire(t, c, locker.WithHolder("me"))
	h, err := c.Inspect(t.Context(), "k")
	if err != nil || h.Token != l.Token() || h.Holder != "me" {
		t.Errorf("got %+v, %v", h, err)
	}
	if h, err := c.Inspect(t.Context(), "free"); err != nil || h.Token != 0 {
		t.Errorf("a free key: got %+v, %v", h, err)
	}
	_, blind := setup(t)
	if _, err := blind.Inspect(t.Context(), "k"); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), `memory: inspect "k"`) {
		t.Error(err)
	}
	equal(t, "Locker", c.Locker(), locker.Locker(back))
}

// slow is a spy that can be asked who holds a key, and never answers.
type slow struct{ *spy }

func (s slow) Inspect(ctx context.Context, _ string) (locker.Holding, error) {
	s.note(call{op: "inspect"})
	<-ctx.Done()
	return locker.Holding{}, ctx.Err()
}

func TestCloseEndsAnInspect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSpy(t)
		c := newClient(t, slow{s})
		var ended time.Duration
		go func() {
			_, err := c.Inspect(t.Context(), "k")
			if !errors.Is(err, locker.ErrClosed) || errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want ErrClosed alone", err)
			}
			ended = s.now()
		}()
		synctest.Wait()
		s.at(time.Second)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		equal(t, "inspects", len(s.seen("inspect")), 1)
		equal(t, "ended at", ended, time.Second)
	})
}

func TestClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSpy(t)
		c, err := locker.New(s, locker.WithTTL(ttl))
		if err != nil {
			t.Fatal(err)
		}
		s.on("release", always(travels(time.Second/2, time.Second/2)))
		l := acquire(t, c)
		var waiters sync.WaitGroup
		for range 3 { // one asks the server, or would; the others wait in the process
			waiters.Go(func() {
				_, err := c.Acquire(t.Context(), "k")
				if !errors.Is(err, locker.ErrClosed) {
					t.Error("a wait ended with", err)
				}
				equal(t, "waits end at", s.now(), time.Second)
			})
		}
		s.at(time.Second)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "closed at", s.now(), 2*time.Second)
		isLost(t, l.Err(), l, locker.ReasonClosed)
		isLost(t, context.Cause(l.Context()), l, locker.ReasonClosed)
		equal(t, "held", len(s.store.Holdings()), 0)
		equal(t, "closes of a Locker that is not the Client's", len(s.seen("close")), 0)
		waiters.Wait()
		requests := len(s.calls)
		if err := c.Close(); err != nil {
			t.Error("the second Close:", err)
		}
		if _, err := c.Acquire(t.Context(), "k"); !errors.Is(err, locker.ErrClosed) {
			t.Error("Acquire:", err)
		}
		if _, err := c.Inspect(t.Context(), "k"); !errors.Is(err, locker.ErrClosed) && !errors.Is(err, errors.ErrUnsupported) {
			t.Error("Inspect:", err)
		}
		isLost(t, l.Release(t.Context()), l, locker.ReasonClosed)
		s.at(5 * ttl)
		equal(t, "requests after Close", len(s.calls), requests)
	})
}

func TestCloseEndsAWaitAtTheServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, time.Hour)
		s.on("release", always(travels(time.Second, 0)))
		var waiter sync.WaitGroup
		waiter.Go(func() {
			if _, err := c.Acquire(t.Context(), "k"); !errors.Is(err, locker.ErrClosed) {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "withdrawals that Close waited for", len(s.seen("release")), 1)
		equal(t, "closed at", s.now(), time.Second)
		equal(t, "waiters at the server", s.store.Holdings()[0].Waiters, 0)
		waiter.Wait()
	})
}

// A second Close waits for the first, for the warning's callback, and for clean-ups of locks that were lost before.
func TestCloseWaitsForWhatTheClientStarted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSpy(t)
		warned := false
		c := newClient(t, s, locker.WithWarning(time.Second, func(*locker.Lock) {
			time.Sleep(time.Minute)
			warned = true
		}))
		s.on("extend", always(refused))
		l := acquire(t, c)
		<-l.Done()
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				equal(t, "warned", warned, true)
				equal(t, "closed at", s.now(), trust-time.Second+time.Minute)
			})
		}
		both.Wait()
		equal(t, "clean-ups", len(s.seen("release")), 1)
	})
}

// The last thing that a renewal does is to log; what it logs to may be gone after Close.
func TestCloseWaitsForTheLog(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSpy(t)
		s.on("extend", always(refused))
		log := &slowLog{lines: make(chan string, 10)}
		c := newClient(t, s, locker.WithLogger(slog.New(log)))
		acquire(t, c)
		s.at(ttl / 3)
		synctest.Wait() // the first renewal has failed, and is being logged
		equal(t, "lines", len(log.lines), 0)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "lines", len(log.lines), 1)
		equal(t, "line", <-log.lines, "renewal failed")
		equal(t, "closed at", s.now(), ttl/3+time.Minute)
	})
}

// slowLog takes a minute for a line.
type slowLog struct {
	slog.Handler
	lines chan string
}

func (l *slowLog) Enabled(context.Context, slog.Level) bool { return true }

func (l *slowLog) Handle(_ context.Context, r slog.Record) error {
	time.Sleep(time.Minute)
	l.lines <- r.Message
	return nil
}

func TestCloseDoesNotWaitForAMinimumHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMinHold(8*time.Second))
		l := acquire(t, c)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "closed at", s.now(), 0)
		equal(t, "kept by the server", len(s.store.Holdings()), 1)
	})
}

func TestCloseBetweenReleaseAndMinimumHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMinHold(8*time.Second))
		s.on("extend", always(deaf(0, time.Second)))
		l := acquire(t, c)
		s.at(3 * time.Second)
		synctest.Wait()
		var release sync.WaitGroup
		release.Go(func() {
			if err := l.Release(t.Context()); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "closed at", s.now(), 4*time.Second)
		release.Wait()
	})
}

func TestCloseOfAnEndedServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithReleaseTimeout(2*time.Second))
		acquire(t, c)
		s.on("release", always(hung))
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if s.now() > 2*time.Second {
			t.Errorf("Close took %v", s.now())
		}
	})
}

// A lock that is held costs no goroutine, and less memory than 2 kB, the store's part included. Of a released
// lock the store remembers the ID for a while.
func TestHeldLocksAreCheap(t *testing.T) {
	const locks = 1000
	c := newClient(t, membackend.New(), locker.WithTTL(time.Hour))
	level := func() (goroutines int, heap uint64) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), m.HeapAlloc
	}
	goroutines, heap := level()
	held := make([]*locker.Lock, locks)
	for i := range held {
		l, err := c.Acquire(t.Context(), fmt.Sprint("lock ", i))
		if err != nil {
			t.Fatal(err)
		}
		held[i] = l
	}
	now, full := level()
	if now > goroutines {
		t.Errorf("%d held locks cost %d goroutines", locks, now-goroutines)
	}
	each := (full - heap) / locks
	t.Logf("%d bytes for each held lock, half of it in the store", each)
	if each > 2000 {
		t.Errorf("a held lock costs %d bytes", each)
	}
	for _, l := range held {
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	clear(held)
	if _, empty := level(); empty > heap+locks*600 {
		t.Errorf("%d bytes stay behind for each released lock", (empty-heap)/locks)
	}
}
