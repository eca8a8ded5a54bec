package conformance

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// memory is a harness whose Lockers share one store.
func memory() Harness {
	store := membackend.NewStore()
	return Harness{
		TTL: 300 * time.Millisecond,
		Open: func(_ context.Context, net *Network) (locker.Locker, error) {
			return net.Wrap(store.Locker()), nil
		},
	}
}

func newTestSuite(t *testing.T, h Harness) *suite {
	t.Helper()
	s, err := newSuite(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// runOne runs a row of the test's own on memory.
func runOne(t *testing.T, run func(*trial)) Result {
	t.Helper()
	return newTestSuite(t, memory()).run(t.Context(), row{name: "the-row", clause: "The clause.", run: run})
}

// saw fails the test if the result is another or does not tell all texts.
func saw(t *testing.T, r Result, want Outcome, texts ...string) {
	t.Helper()
	if r.Outcome != want {
		t.Fatalf("the row %v, want %v: %v", r.Outcome, want, r)
	}
	for _, text := range texts {
		if !strings.Contains(r.String(), text) {
			t.Errorf("the report does not tell %q:\n%v", text, r)
		}
	}
}

func helperInARow(t *trial) { t.Errorf("seen by a helper") }

func TestFailureTellsClauseLinesAndWhatWasSeen(t *testing.T) {
	t.Parallel()
	r := runOne(t, func(t *trial) {
		t.Logf("first a log")
		t.Errorf("saw %d", 42)
		helperInARow(t)
		t.Fatalf("the end")
		panic("not reached")
	})
	saw(t, r, Failed, "the-row failed", "clause: The clause.", "row:    check_test.go:", "first a log", "saw 42", "the end")
	if !regexp.MustCompile(`check_test.go:\d+ < check_test.go:\d+: seen by a helper`).MatchString(r.Seen) {
		t.Errorf("the report does not name the helper's line and its caller's:\n%v", r)
	}
}

func TestPanicIsAFailure(t *testing.T) {
	t.Parallel()
	saw(t, runOne(t, func(*trial) { panic("oh no") }), Failed, "panic: oh no", "check_test.go:")
	saw(t, runOne(t, func(t *trial) { t.spawn(func() { panic("oh no") }) }), Failed, "panic: oh no")
	saw(t, runOne(t, func(t *trial) { t.cleanup(func() { panic("oh no") }) }), Failed, "panic: oh no")
}

func TestFailureInSpawnedGoroutine(t *testing.T) {
	t.Parallel()
	saw(t, runOne(t, func(t *trial) { t.spawn(func() { t.Fatalf("in a goroutine") }) }), Failed, "in a goroutine")
}

func TestSkipSaysWhy(t *testing.T) {
	t.Parallel()
	saw(t, runOne(t, func(t *trial) { t.Skipf("no reason") }), Skipped, "no reason")
	saw(t, runOne(t, func(t *trial) { t.Errorf("bad"); t.Skipf("no reason") }), Failed, "bad")
	s := newTestSuite(t, memory())
	r := s.run(t.Context(), row{needs: needCrash | needProcess | needExpire, run: func(*trial) { panic("run") }})
	saw(t, r, Skipped, "the harness has no Expire, no Server.Crash, no Process")
}

func TestWatchdogNamesAHang(t *testing.T) {
	t.Parallel()
	s := newTestSuite(t, memory())
	s.TTL, s.slack = 2*time.Millisecond, time.Millisecond
	hang := func(t *trial) { <-t.ctx.Done() }
	saw(t, s.run(t.Context(), row{run: hang}), Failed, "watchdog: still running after 230ms", "check_test.go")

	// One that does not even listen to its context is left alone.
	end := make(chan struct{})
	defer close(end)
	saw(t, s.run(t.Context(), row{run: func(*trial) { <-end }}), Failed, "abandoned", "check_test.go")
}

func TestWhatIsLeftBehindIsAFailure(t *testing.T) {
	t.Parallel()
	end := make(chan struct{})
	defer close(end)
	s := newTestSuite(t, memory())
	s.slack = 5 * time.Millisecond
	saw(t, s.run(t.Context(), row{run: func(*trial) { go func() { <-end }() }}), Failed, "goroutines are left", "check_test.go")

	server := newEcho(t)
	h := memory()
	inner := h.Open
	h.Open = func(ctx context.Context, net *Network) (locker.Locker, error) {
		if _, err := net.DialContext(ctx, "tcp", server.Addr().String()); err != nil {
			return nil, err
		}
		return inner(ctx, net)
	}
	s = newTestSuite(t, h)
	s.slack = 5 * time.Millisecond
	saw(t, s.run(t.Context(), row{run: func(t *trial) { t.open() }}), Failed, "1 connections are open after Close")
}

func TestTrialCleansUpInReverse(t *testing.T) {
	t.Parallel()
	var order []string
	saw(t, runOne(t, func(t *trial) {
		client, net := t.client()
		if _, err := client.Acquire(t.ctx, t.key("held")); err != nil {
			t.Fatalf("%v", err)
		}
		net.Cut() // the trial heals it
		t.cleanup(func() { order = append(order, "first registered") })
		t.cleanup(func() { order = append(order, "last registered") })
		t.spawn(func() {
			<-t.ctx.Done()
			order = append(order, "spawned")
		})
	}), Passed)
	if want := []string{"spawned", "last registered", "first registered"}; !slices.Equal(order, want) {
		t.Errorf("got %q, want %q", order, want)
	}
}

func TestTrialHelpersSeeWhatTheyClaim(t *testing.T) {
	t.Parallel()
	saw(t, runOne(t, func(t *trial) {
		a, _ := t.open()
		b, _ := t.open()
		key := t.key("")
		lease := t.acquire(a, key)
		t.mustBeHeld(b, key)
		granted, at := t.freeWithin(b, key, lease.Start, t.freed())
		if held := at.Sub(lease.Start); held < t.TTL {
			t.Errorf("free after %v, before the TTL", held)
		}
		t.release(b, granted)
		t.mustBeFree(a, key)
	}), Passed)
	for what, run := range map[string]func(*trial, locker.Locker, string){
		"should be held": func(t *trial, l locker.Locker, key string) { t.mustBeHeld(l, key) },
		"should be free": func(t *trial, l locker.Locker, key string) { t.acquire(l, key); t.mustBeFree(l, key) },
		"still held": func(t *trial, l locker.Locker, key string) {
			t.acquire(l, key)
			t.freeWithin(l, key, time.Now(), t.TTL/5)
		},
		"which is free":  func(t *trial, l locker.Locker, key string) { t.acquire(l, key); t.acquire(l, key) },
		"which is held":  func(t *trial, l locker.Locker, key string) { t.release(l, locker.Lease{Key: key, ID: "x", Token: 1}) },
		"not true: ever": func(t *trial, _ locker.Locker, _ string) { t.eventually(0, "ever", func() bool { return false }) },
		"the harness's Expire: no": func(t *trial, _ locker.Locker, _ string) {
			t.Expire = func(context.Context, locker.Lease) error { return errors.New("no") }
			t.expire(locker.Lease{})
		},
	} {
		saw(t, runOne(t, func(t *trial) {
			l, _ := t.open()
			run(t, l, t.key(""))
		}), Failed, what)
	}
}

func TestPollAsksOnceMoreAfterTheEnd(t *testing.T) {
	t.Parallel()
	asked := 0
	if !poll(time.Millisecond, func() bool {
		if asked++; asked == 1 {
			_ = poll(5*time.Millisecond, func() bool { return false }) // an answer that takes too long
		}
		return asked > 1
	}) {
		t.Error("what was answered late, but asked in time, counts as the last answer")
	}
}

func TestScheduleRunsRowsThatAreAloneLast(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	running, most := 0, 0
	var order []string
	rows := []row{{name: "hurts", hurts: true}, {name: "alone", alone: true}}
	for range 40 {
		rows = append(rows, row{name: "together"})
	}
	rows = append(rows, row{name: "alone", alone: true})
	schedule(rows, atOnce, func(r row) {
		mu.Lock()
		running++
		most = max(most, running)
		if (r.alone || r.hurts) && running > 1 {
			t.Error("a row that should be alone has company")
		}
		order = append(order, r.name)
		mu.Unlock()
		if !r.alone && !r.hurts {
			poll(200*time.Millisecond, func() bool {
				mu.Lock()
				defer mu.Unlock()
				return most == atOnce
			})
		}
		mu.Lock()
		running--
		mu.Unlock()
	})
	if len(order) != 43 || !slices.Equal(order[40:], []string{"alone", "alone", "hurts"}) {
		t.Errorf("the order was %q", order)
	}
	if most != atOnce {
		t.Errorf("%d rows ran at once, want %d", most, atOnce)
	}
}

func TestHarnessThatCannotStart(t *testing.T) {
	t.Parallel()
	no := errors.New("no server")
	for want, h := range map[string]Harness{
		"has no Open": {},
		"cannot open": {Open: func(context.Context, *Network) (locker.Locker, error) { return nil, no }},
		"a first acquire and release": {Open: func(context.Context, *Network) (locker.Locker, error) {
			b := membackend.New()
			return b, b.Close()
		}},
	} {
		err := Check(t.Context(), h, func(Result) { t.Error("a row ran") })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want that it %s", err, want)
		}
	}
}

func TestCheckReportsEveryRow(t *testing.T) {
	t.Parallel()
	s := newTestSuite(t, memory())
	rows := []row{
		{name: "good", run: func(*trial) {}},
		{name: "bad", run: func(t *trial) { t.Fatalf("bad") }},
		{name: "skipped", run: func(t *trial) { t.Skipf("here") }},
	}
	got := make(map[string]Outcome)
	s.runRows(t.Context(), rows, func(r Result) { got[r.Row] = r.Outcome })
	if len(got) != 3 || got["good"] != Passed || got["bad"] != Failed || got["skipped"] != Skipped {
		t.Errorf("got %v", got)
	}
}

// fakeT is a *testing.T that remembers how its subtests ended.
type fakeT struct {
	name string
	ctx  context.Context
	mu   *sync.Mutex
	got  map[string]string
}

func (f *fakeT) note(how string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got[f.name] = how
}

func (f *fakeT) Run(name string, test func(*fakeT)) bool {
	test(&fakeT{name: name, ctx: f.ctx, mu: f.mu, got: f.got})
	return true
}
func (f *fakeT) Context() context.Context { return f.ctx }
func (f *fakeT) Helper()                  {}
func (f *fakeT) Log(...any)               { f.note("log") }
func (f *fakeT) Skip(...any)              { f.note("skip") }
func (f *fakeT) Error(...any)             { f.note("error") }
func (f *fakeT) Fatal(...any)             { f.note("fatal") }

func TestRunMakesASubtestOfEachRow(t *testing.T) {
	t.Parallel()
	f := &fakeT{ctx: t.Context(), mu: new(sync.Mutex), got: make(map[string]string)}
	runRowsAsTests(f, newTestSuite(t, memory()), []row{
		{name: "good", run: func(*trial) {}},
		{name: "chatty", run: func(t *trial) { t.Logf("hello") }},
		{name: "bad", run: func(t *trial) { t.Fatalf("bad") }},
		{name: "skipped", run: func(t *trial) { t.Skipf("here") }},
	})
	if f.got["good"] != "" || f.got["chatty"] != "log" || f.got["bad"] != "error" || f.got["skipped"] != "skip" {
		t.Errorf("got %v", f.got)
	}
	Run(f, Harness{})
	if f.got[""] != "fatal" {
		t.Errorf("a harness without Open: got %q, want fatal", f.got[""])
	}
}

func TestRowsHaveNamesClausesAndFunctions(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for _, r := range allRows() {
		if !regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`).MatchString(r.name) || seen[r.name] {
			t.Errorf("the name %q is not of lower-case words with hyphens, or not unique", r.name)
		}
		if !strings.HasSuffix(r.clause, ".") || r.run == nil {
			t.Errorf("row %q has no function, or a clause that is not a sentence: %q", r.name, r.clause)
		}
		seen[r.name] = true
	}
}

func TestNetworkRowsPassOnMemory(t *testing.T) {
	t.Parallel()
	newTestSuite(t, memory()).runRows(t.Context(), networkRows, func(r Result) {
		if r.Outcome != Passed {
			t.Error(r)
		}
	})
}

// The rows that prove the faults must fail where the traffic goes past the Network.
func TestNetworkRowsFailWithoutTheNetwork(t *testing.T) {
	t.Parallel()
	store := membackend.NewStore()
	h := memory()
	h.Open = func(context.Context, *Network) (locker.Locker, error) { return store.Locker(), nil }
	newTestSuite(t, h).runRows(t.Context(), networkRows, func(r Result) {
		if r.Outcome != Failed {
			t.Errorf("%s passes on a backend that does not use the Network", r.Row)
		}
	})
}
