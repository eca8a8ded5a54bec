package locker_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
)

// line lets n goroutines wait for the key in a known order, and returns the order in which they got it. Waiter i has ctxs[i], if
// there is one.
func line(t *testing.T, c *locker.Client, n int, ctxs map[int]context.Context) (served func() []int) {
	t.Helper()
	var mu sync.Mutex
	var order []int
	var all sync.WaitGroup
	for i := range n {
		ctx, ok := ctxs[i]
		if !ok {
			ctx = t.Context()
		}
		all.Go(func() {
			l, err := c.Acquire(ctx, "k")
			if ok {
				if !errors.Is(err, context.Canceled) || !errors.Is(err, locker.ErrHeld) {
					t.Errorf("cancelled waiter %d: %v", i, err)
				}
				return
			}
			if err != nil {
				t.Errorf("waiter %d: %v", i, err)
				return
			}
			mu.Lock()
			order = append(order, i)
			mu.Unlock()
			if err := l.Release(t.Context()); err != nil {
				t.Errorf("waiter %d: %v", i, err)
			}
		})
		synctest.Wait() // now it waits
	}
	return func() []int {
		all.Wait()
		return order
	}
}

func TestQueueIsFIFO(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const n = 100
		s, c := setup(t)
		l := acquire(t, c)
		served := line(t, c, n, nil)
		equal(t, "requests while they wait", len(s.seen("acquire")), 1)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		order := served()
		if len(order) != n || !slices.IsSorted(order) {
			t.Errorf("order: %v", order)
		}
		equal(t, "requests, one for each", len(s.seen("acquire")), n+1)
	})
}

// The first in line asks the server, and while it does the others cost the server nothing.
func TestOneOfAllWaitsAtTheServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, 20*time.Second)
		served := line(t, c, 100, nil)
		equal(t, "requests", len(s.seen("acquire")), 1)
		equal(t, "waiters at the server", s.store.Holdings()[0].Waiters, 1)
		if order := served(); len(order) != 100 || !slices.IsSorted(order) {
			t.Errorf("order: %v", order)
		}
		equal(t, "served at", s.now(), 20*time.Second)
	})
}

func TestCancelledWaitersDisturbNone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		cancelled := map[int]context.Context{0: ctx, 1: ctx, 7: ctx, 10: ctx, 19: ctx}
		served := line(t, c, 20, cancelled)
		s.at(time.Second)
		cancel()
		synctest.Wait()
		equal(t, "requests for the cancelled", len(s.seen("acquire"))+len(s.seen("release")), 1)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "order", served(), []int{2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18})
		equal(t, "served at", s.now(), time.Second)
	})
}

// The waiter that asks the server for all is cancelled: the next in line asks.
func TestCancellingTheOneThatAsks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, 10*time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		served := line(t, c, 5, map[int]context.Context{0: ctx})
		cancel()
		synctest.Wait()
		equal(t, "requests", len(s.seen("acquire")), 2)
		equal(t, "waiters at the server", s.store.Holdings()[0].Waiters, 1)
		equal(t, "order", served(), []int{1, 2, 3, 4})
		equal(t, "served at", s.now(), 10*time.Second)
	})
}

// A cancel and a turn that come at the same moment must not lose the turn.
func TestTurnIsNotLostToACancel(t *testing.T) {
	_, c := setup(t)
	for range 2000 {
		l := acquire(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for _, ctx := range []context.Context{ctx, ctx, t.Context()} {
			all.Go(func() {
				l, err := c.Acquire(ctx, "k")
				if err == nil {
					err = l.Release(t.Context())
				}
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		if rand.IntN(2) == 0 {
			all.Go(cancel)
		} else {
			cancel()
		}
		if err := l.Release(t.Context()); err != nil {
			t.Error(err)
		}
		all.Wait()
		cancel()
	}
}

func TestNoWaitAnswersFromWhatTheProcessKnows(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c, locker.WithHolder("me"))
		s.at(time.Second)
		_, err := c.Acquire(t.Context(), "k", locker.WithNoWait())
		held, ok := errors.AsType[*locker.HeldError](err)
		if !ok || *held != (locker.HeldError{Key: "k", Holder: "me", Remaining: 8 * time.Second}) {
			t.Error(err)
		}
		equal(t, "requests", len(s.calls), 1)

		if _, err := c.Acquire(t.Context(), "k", locker.WithWait(time.Second)); !errors.Is(err, locker.ErrHeld) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error("a wait behind the lock:", err)
		}
		equal(t, "requests", len(s.calls), 1)

		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		acquire(t, c, locker.WithNoWait())
	})
}

// While another goroutine is still asking, nobody in the process knows: the server is asked.
// Timers stand still in a suspend: a lock that has ended in it holds nobody up.
func TestNoWaitAsksAfterASuspend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		c := newClient(t, n)
		l := acquire(t, c)
		n.suspend(ttl)
		if _, err := c.Acquire(t.Context(), "k", locker.WithNoWait()); !errors.Is(err, locker.ErrHeld) {
			t.Error("the store, whose time stood still:", err)
		}
		equal(t, "acquires", len(n.seen("acquire")), 2)
		isLost(t, l.Err(), l, locker.ReasonExpired)
	})
}

func TestNoWaitAsksWhereNobodyKnows(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.hold(t, 10*time.Second)
		served := line(t, c, 1, nil)
		_, err := c.Acquire(t.Context(), "k", locker.WithNoWait())
		if held, ok := errors.AsType[*locker.HeldError](err); !ok || held.Holder != "other program" {
			t.Error(err)
		}
		equal(t, "requests", len(s.seen("acquire")), 2)
		equal(t, "clean-ups after a plain ErrHeld", len(s.seen("release")), 0)
		served()
	})
}

func TestKeysDoNotQueueForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		acquire(t, c)
		for _, key := range []string{"K", "k ", "k/", "kk"} {
			if _, err := c.Acquire(t.Context(), key, locker.WithNoWait()); err != nil {
				t.Error(err)
			}
		}
		equal(t, "at", s.now(), 0)
	})
}

// A lock that is lost passes the turn on: the next asks the server, which knows.
func TestLossPassesTheTurnOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		acquire(t, c)
		s.on("extend", always(refused))
		served := line(t, c, 3, nil)
		equal(t, "order", served(), []int{0, 1, 2})
		equal(t, "served when the server's time was over", s.now(), ttl)
		equal(t, "asked when the trust was over", s.moments("acquire")[1], trust)
	})
}

// A server that refuses everything refuses each caller at once: none waits for the withdrawal of the one before.
func TestDeadServerAnswersEveryoneAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("acquire", always(refused))
		s.on("release", always(refused))
		for range 5 {
			if _, err := c.Acquire(t.Context(), "k"); err == nil {
				t.Error("acquired from a server that refuses")
			}
		}
		equal(t, "answered after", s.now(), 0)
	})
}
