package locker_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
)

var (
	errWork = errors.New("the printer burns")
	errUndo = errors.New("no refund")
)

// undone counts compensations and remembers what they were told.
type undone struct {
	lost []*locker.LostError
	err  error
	left time.Duration // that the last one's ctx had
}

func (u *undone) option() locker.DoOption {
	return locker.WithCompensation(func(ctx context.Context, lost *locker.LostError) error {
		u.lost = append(u.lost, lost)
		if end, ok := ctx.Deadline(); ok && ctx.Err() == nil {
			u.left = time.Until(end)
		}
		return u.err
	})
}

// The table of what Do answers, line by line.
func TestDo(t *testing.T) {
	expire := func(s *spy) { s.store.Expire("k"); synctest.Wait() }
	for _, c := range []struct {
		name   string
		during func(s *spy) // happens while the work runs
		work   error
		lost   locker.Reason // 0: not lost
		logs   bool
		opts   []locker.Option
	}{
		{name: "trust intact, released"},
		{name: "trust intact, released, work failed", work: errWork},
		{name: "work of many TTLs", during: func(s *spy) { s.at(6 * ttl) }},
		{name: "release refused for ever", during: func(s *spy) { s.on("release", always(refused)) }, logs: true},
		{name: "release hangs, work failed", during: func(s *spy) { s.on("release", always(hung)) }, work: errWork, logs: true},
		{name: "answer of the release lost", during: func(s *spy) { s.on("release", first(reset)) }},
		{
			name: "ErrLost after a try with an unknown outcome", logs: true,
			during: func(s *spy) { s.on("release", first(reset, answers(locker.ErrLost))) },
		},
		{
			name: "ErrLost is the first answer", lost: locker.ReasonTaken,
			during: func(s *spy) { s.on("release", first(answers(locker.ErrLost))) },
		},
		{name: "taken", during: expire, lost: locker.ReasonTaken},
		{name: "taken, work failed", during: expire, work: errWork, lost: locker.ReasonTaken},
		{
			name: "server gone", lost: locker.ReasonExpired,
			during: func(s *spy) { s.on("extend", always(hung)); s.on("release", always(hung)); s.at(2 * ttl) },
		},
		{name: "trust runs out", opts: []locker.Option{locker.WithoutHeartbeat()}, during: func(s *spy) { s.at(trust) }, lost: locker.ReasonExpired},
		{name: "trust does not run out", opts: []locker.Option{locker.WithoutHeartbeat()}, during: func(s *spy) { s.at(trust - 1) }},
		{
			name: "held for too long", opts: []locker.Option{locker.WithMaxHold(ttl)}, work: errWork,
			during: func(s *spy) { s.at(ttl) }, lost: locker.ReasonMaxHold,
		},
	} {
		for _, compensates := range []string{"", "well", "badly"} {
			t.Run(c.name+", compensates "+compensates, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var logs bytes.Buffer
					s, client := setup(t, append(c.opts, locker.WithLogger(slog.New(slog.NewTextHandler(&logs, nil))))...)
					opts, undo := []locker.DoOption{}, &undone{}
					if compensates != "" {
						opts = append(opts, undo.option())
					}
					if compensates == "badly" {
						undo.err = errUndo
					}
					var lock *locker.Lock
					err := client.Do(t.Context(), "k", func(ctx context.Context, l *locker.Lock) error {
						lock = l
						logs.Reset()
						if c.during != nil {
							c.during(s)
						}
						if c.lost != 0 && c.lost != locker.ReasonTaken && ctx.Err() == nil {
							t.Error("the work was not told")
						}
						return c.work
					}, opts...)

					equal(t, "logged", strings.Contains(logs.String(), "release"), c.logs)
					if c.lost == 0 {
						equal(t, "Do", err, c.work)
						equal(t, "compensations", len(undo.lost), 0)
						return
					}
					isLost(t, err, lock, c.lost)
					lost := locker.LostError{Key: "k", Token: lock.Token(), Reason: c.lost}
					failed, ok := errors.AsType[*locker.DoError](err)
					if !ok {
						t.Fatalf("no DoError: %v", err)
					}
					equal(t, "DoError", *failed, locker.DoError{Lost: &lost, Work: c.work, Compensation: undo.err})
					if compensates != "" {
						equal(t, "compensations", undo.lost, []*locker.LostError{&lost})
						equal(t, "time for the compensation", undo.left, time.Minute)
					}
					equal(t, "matches the work's error", errors.Is(err, errWork), c.work != nil)
					equal(t, "matches the compensation's error", errors.Is(err, errUndo), undo.err != nil)
				})
			})
		}
	}
}

func TestDoErrorTellsAll(t *testing.T) {
	err := &locker.DoError{Lost: &locker.LostError{Key: "k", Token: 7, Reason: locker.ReasonExpired}}
	equal(t, "message", err.Error(), `locker: lock "k" (token 7) lost: expired`)
	err.Work, err.Compensation = errWork, errUndo
	equal(t, "message", err.Error(), `locker: lock "k" (token 7) lost: expired; the work: the printer burns; the compensation: no refund`)
}

func TestDoWithoutTheLockRunsNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, time.Hour)
		undo := &undone{}
		err := c.Do(t.Context(), "k", func(context.Context, *locker.Lock) error {
			t.Error("the work ran")
			return nil
		}, locker.WithNoWait(), undo.option())
		if !errors.Is(err, locker.ErrHeld) || errors.Is(err, locker.ErrLost) {
			t.Error(err)
		}
		equal(t, "compensations", len(undo.lost), 0)
	})
}

// Do's own cancel is no loss: the work sees it, the lock is released, nothing is compensated.
func TestDoCancelledIsNoLoss(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		undo := &undone{}
		reason := errors.New("the program stops")
		ctx, cancel := context.WithCancelCause(t.Context())
		err := c.Do(ctx, "k", func(ctx context.Context, l *locker.Lock) error {
			cancel(reason)
			<-ctx.Done()
			equal(t, "cause", context.Cause(ctx), reason)
			equal(t, "the lock", l.Err(), nil)
			return ctx.Err()
		}, undo.option())
		equal(t, "Do", err, context.Canceled)
		equal(t, "compensations", len(undo.lost), 0)
		equal(t, "held", len(s.store.Holdings()), 0)
	})
}

// The compensation's ctx has the values of Do's, and is alive although that has ended.
func TestCompensationAfterACancel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		type name struct{}
		s, c := setup(t)
		ran := false
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), name{}, "value"))
		err := c.Do(ctx, "k", func(context.Context, *locker.Lock) error {
			s.store.Expire("k")
			cancel()
			return nil
		}, locker.WithCompensation(func(ctx context.Context, _ *locker.LostError) error {
			ran = true
			equal(t, "value", ctx.Value(name{}), any("value"))
			equal(t, "err", ctx.Err(), nil)
			<-ctx.Done()
			return ctx.Err()
		}))
		if !ran || !errors.Is(err, locker.ErrLost) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(ran, err)
		}
	})
}

// The work is told at the moment of the loss, and is waited for however long it takes to end.
func TestDoWaitsForWorkThatIgnoresTheLoss(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", always(hung))
		undo := &undone{}
		err := c.Do(t.Context(), "k", func(ctx context.Context, l *locker.Lock) error {
			<-ctx.Done()
			equal(t, "told at", s.now(), trust)
			isLost(t, context.Cause(ctx), l, locker.ReasonExpired)
			time.Sleep(time.Hour)
			equal(t, "compensations before the work's end", len(undo.lost), 0)
			return nil
		}, undo.option())
		if !errors.Is(err, locker.ErrLost) || len(undo.lost) != 1 || s.now() != time.Hour+trust {
			t.Errorf("%v at %v after %d compensations", err, s.now(), len(undo.lost))
		}
	})
}

func TestDoAfterASuspendThatNobodyNoticed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		undo := &undone{}
		err := newClient(t, n).Do(t.Context(), "k", func(context.Context, *locker.Lock) error {
			n.suspend(ttl)
			return nil
		}, undo.option())
		if !errors.Is(err, locker.ErrLost) || len(undo.lost) != 1 {
			t.Errorf("%v after %d compensations", err, len(undo.lost))
		}
	})
}

func TestPanicAndGoexitReleaseTheLock(t *testing.T) {
	for _, lose := range []bool{false, true} {
		for name, end := range map[string]func(){"panic": func() { panic("boom") }, "Goexit": runtime.Goexit} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					s, c := setup(t)
					undo := &undone{}
					var recovered any
					var work sync.WaitGroup
					work.Add(1)
					go func() {
						defer work.Done()
						defer func() { recovered = recover() }()
						err := c.Do(t.Context(), "k", func(context.Context, *locker.Lock) error {
							if lose {
								s.store.Expire("k")
							}
							end()
							return nil
						}, undo.option())
						t.Error("Do returned", err)
					}()
					work.Wait()
					synctest.Wait()
					equal(t, "held", len(s.store.Holdings()), 0)
					equal(t, "releases", len(s.seen("release")), 1)
					equal(t, "compensated", len(undo.lost) == 1, lose)
					equal(t, "the panic goes on", recovered == "boom", name == "panic")
				})
			})
		}
	}
}

// Work that releases the lock by itself is done with it.
func TestDoWithWorkThatReleases(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		undo := &undone{}
		err := c.Do(t.Context(), "k", func(ctx context.Context, l *locker.Lock) error {
			if err := l.Release(ctx); err != nil {
				t.Error(err)
			}
			equal(t, "cause", context.Cause(ctx), locker.ErrReleased)
			return errWork
		}, undo.option())
		equal(t, "Do", err, errWork)
		equal(t, "compensations", len(undo.lost), 0)
		equal(t, "releases", len(s.seen("release")), 1)
	})
}

func TestCloseDuringDo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		undo := &undone{}
		err := c.Do(t.Context(), "k", func(ctx context.Context, l *locker.Lock) error {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			isLost(t, context.Cause(ctx), l, locker.ReasonClosed)
			return ctx.Err()
		}, undo.option())
		failed, ok := errors.AsType[*locker.DoError](err)
		if !ok || failed.Lost.Reason != locker.ReasonClosed || !errors.Is(err, context.Canceled) || len(undo.lost) != 1 {
			t.Errorf("%v after %d compensations", err, len(undo.lost))
		}
		equal(t, "held", len(s.store.Holdings()), 0)
	})
}

func TestDoRefusesNilWork(t *testing.T) {
	s, c := setup(t)
	if err := c.Do(t.Context(), "k", nil); err == nil || err.Error() != `locker: do "k": the work is nil` {
		t.Error(err)
	}
	equal(t, "requests", len(s.calls), 0)
}
