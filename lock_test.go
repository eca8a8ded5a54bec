package locker_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
)

func TestDeadlineCountsFromTheSend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("acquire", always(travels(time.Second, time.Second)))
		s.on("extend", always(travels(200*time.Millisecond, 300*time.Millisecond)))
		l := acquire(t, c)
		equal(t, "granted at", s.now(), 2*time.Second)
		equal(t, "deadline", l.Deadline().Sub(s.made), trust)
		s.at(3500 * time.Millisecond)
		synctest.Wait()
		equal(t, "extends", s.moments("extend"), seconds(3))
		equal(t, "deadline of the renewal", l.Deadline().Sub(s.made), 3*time.Second+trust)
	})
}

// A wait does not eat the lease: the lock is trusted from its grant.
func TestDeadlineCountsFromTheGrantAfterAWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		other, err := s.store.Locker().Acquire(t.Context(), locker.Request{Key: "k", ID: "other", TTL: 40 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		l := acquire(t, c)
		equal(t, "granted at", s.now(), 40*time.Second)
		equal(t, "deadline", l.Deadline().Sub(s.made), 40*time.Second+trust)
		if l.Token() <= other.Token {
			t.Errorf("token %d after %d", l.Token(), other.Token)
		}
	})
}

// A backend whose Start lies in the future must not gain trust by it.
func TestStartInTheFutureIsNotBelieved(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		wrong := func(ctx context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
			lease, err := travels(0, time.Second)(ctx, ask)
			lease.Start = lease.Start.Add(time.Hour)
			return lease, err
		}
		s.on("acquire", always(wrong))
		s.on("extend", always(wrong))
		l := acquire(t, c)
		equal(t, "deadline", l.Deadline().Sub(s.made), trust)
		s.at(4*time.Second + 1)
		equal(t, "deadline of the renewal", l.Deadline().Sub(s.made), 3*time.Second+trust)
	})
}

func TestErrTurnsAtTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithoutHeartbeat())
		l := acquire(t, c)
		bound, cancel := l.Bind(t.Context())
		defer cancel()
		s.at(trust - 1)
		synctest.Wait()
		for what, err := range map[string]error{"Lock": l.Err(), "Context": l.Context().Err(), "Bind": bound.Err()} {
			if err != nil {
				t.Errorf("%s.Err a nanosecond before the deadline: %v", what, err)
			}
		}
		s.at(trust)
		isLost(t, l.Err(), l, locker.ReasonExpired)
		synctest.Wait()
		for what, ctx := range map[string]context.Context{"Context": l.Context(), "Bind": bound} {
			if err := ctx.Err(); !errors.Is(err, context.Canceled) {
				t.Errorf("%s.Err at the deadline: %v", what, err)
			}
			isLost(t, context.Cause(ctx), l, locker.ReasonExpired)
		}
		<-l.Done()
	})
}

// No goroutine and no timer gets to run between the suspend and the questions: monotonic time stands still.
func TestErrAfterASuspendNeedsNoGoroutine(t *testing.T) {
	asks := map[string]func(l *locker.Lock, bound context.Context) error{
		"Lock.Err":    func(l *locker.Lock, _ context.Context) error { return l.Err() },
		"Context.Err": func(l *locker.Lock, _ context.Context) error { return l.Context().Err() },
		"Bind.Err":    func(_ *locker.Lock, bound context.Context) error { return bound.Err() },
		"Release":     func(l *locker.Lock, _ context.Context) error { return l.Release(context.Background()) },
		"Extend":      func(l *locker.Lock, _ context.Context) error { return l.Extend(context.Background()) },
	}
	for name, ask := range asks {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := &napping{spy: newSpy(t)}
				l := acquire(t, newClient(t, n))
				bound, cancel := l.Bind(t.Context())
				defer cancel()
				n.at(time.Second)
				n.suspend(trust - time.Second - 1)
				if err := l.Err(); err != nil {
					t.Fatal("lost too early:", err)
				}
				n.suspend(1)
				if ask(l, bound) == nil {
					t.Error("nil")
				}
				isLost(t, l.Err(), l, locker.ReasonExpired)
				isLost(t, context.Cause(l.Context()), l, locker.ReasonExpired)
				equal(t, "mono time", n.now(), time.Second)
				equal(t, "extends", len(n.seen("extend")), 0)
			})
		})
	}
}

func TestSuspendShortensTrust(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		l := acquire(t, newClient(t, n, locker.WithoutHeartbeat()))
		n.at(time.Second)
		n.suspend(4 * time.Second)
		equal(t, "deadline", l.Deadline().Sub(n.made), trust-4*time.Second)
		n.at(trust - 4*time.Second - 1)
		if err := l.Err(); err != nil {
			t.Error("too early:", err)
		}
		n.at(trust - 4*time.Second)
		isLost(t, l.Err(), l, locker.ReasonExpired)
	})
}

// Timers stand still in a suspend. Whatever the heartbeat's period is, the clocks are looked at soon after waking.
func TestDoneSoonAfterASuspend(t *testing.T) {
	rare := locker.WithHeartbeat(ttl * 8 / 9)
	for name, opts := range map[string][]locker.Option{
		"default": nil, "rare heartbeat": {rare}, "no heartbeat": {locker.WithoutHeartbeat()}, "no rare heartbeat": {rare, locker.WithoutHeartbeat()},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := &napping{spy: newSpy(t)}
				l := acquire(t, newClient(t, n, opts...))
				n.suspend(ttl)
				n.at(ttl / 3)
				synctest.Wait()
				select {
				case <-l.Done():
				default:
					t.Errorf("not done %v after a suspend of %v", ttl/3, ttl)
				}
			})
		})
	}
}

func TestSuspendIsMadeUpByTheNextRenewal(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		l := acquire(t, newClient(t, n))
		n.at(time.Second)
		n.suspend(4 * time.Second)
		n.at(10 * ttl)
		if err := l.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestSuspendDuringAcquireAsksOnceMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		n.on("acquire", always(n.nap))
		n.on("extend", first(travels(time.Second, time.Second)))
		l := acquire(t, newClient(t, n))
		equal(t, "extends", n.moments("extend"), seconds(0))
		equal(t, "granted at", n.now(), 2*time.Second)
		equal(t, "deadline, from the extend", l.Deadline().Sub(n.made), trust)
		n.at(trust - 1)
		if err := l.Err(); err != nil {
			t.Error("the suspend was before the extend:", err)
		}
	})
}

func TestSuspendDuringBothIsNoGrant(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		n.on("acquire", first(n.nap))
		n.on("extend", first(n.nap))
		c := newClient(t, n)
		if l, err := c.Acquire(t.Context(), "k"); l != nil || err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("got %v, %v", l, err)
		}
		synctest.Wait()
		equal(t, "clean-ups", len(n.seen("release")), 1)
		equal(t, "held", len(n.store.Holdings()), 0)
	})
}

// What an acquire answers is never ErrLost: nothing was granted to its caller.
func TestLeaseLostInASuspendIsNoLossToTheCaller(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		n.on("acquire", first(n.nap))
		n.on("extend", func(int) fate {
			n.store.Expire("k")
			return delivered
		})
		l, err := newClient(t, n).Acquire(t.Context(), "k")
		if l != nil || err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("got %v, %v", l, err)
		}
	})
}

func TestSuspendDuringExtendAsksOnceMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		n.on("extend", first(n.nap, travels(time.Second, 0)))
		l := acquire(t, newClient(t, n))
		n.at(3 * time.Second)
		synctest.Wait()
		equal(t, "extends", n.moments("extend"), seconds(3, 3))
		equal(t, "deadline, nearer by the nap, while the second is under way", l.Deadline().Sub(n.made), trust-time.Second)
		n.at(4 * time.Second)
		synctest.Wait()
		equal(t, "deadline after it", l.Deadline().Sub(n.made), 3*time.Second+trust)

		n.on("extend", first(n.nap))
		if err := l.Extend(t.Context()); err != nil {
			t.Error("Extend:", err)
		}
		equal(t, "deadline after another", l.Deadline().Sub(n.made), 4*time.Second+trust)
	})
}

// A backend may answer with a keepalive that was sent before, and shared by several locks: a suspend between that and this
// call counts.
func TestSuspendBeforeASharedExtendCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		n.on("extend", always(func(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
			lease, err := ask()
			lease.Start = n.made.Add(2 * time.Second)
			return lease, err
		}))
		l := acquire(t, newClient(t, n, locker.WithoutHeartbeat()))
		n.at(2500 * time.Millisecond)
		n.suspend(4 * time.Second)
		n.at(3 * time.Second)
		if err := l.Extend(t.Context()); err != nil {
			t.Error("Extend:", err)
		}
		end := 2*time.Second + trust - 4*time.Second
		equal(t, "deadline", l.Deadline().Sub(n.made), end)
		n.at(end - 1)
		if err := l.Err(); err != nil {
			t.Error("too early:", err)
		}
		n.at(end)
		isLost(t, l.Err(), l, locker.ReasonExpired)
	})
}

func TestLostByTheBackend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		s.at(time.Second)
		s.seen("acquire")[0].req.Lost(locker.ReasonDisconnected)
		isLost(t, l.Err(), l, locker.ReasonDisconnected)
		isLost(t, context.Cause(l.Context()), l, locker.ReasonDisconnected)
		synctest.Wait()
		equal(t, "the lease is released all the same", s.moments("release"), seconds(1))
		equal(t, "by its token", s.seen("release")[0].lease.Token, l.Token())
		s.seen("acquire")[0].req.Lost(locker.ReasonTaken)
		isLost(t, l.Err(), l, locker.ReasonDisconnected)
		s.at(ttl)
		equal(t, "extends", len(s.seen("extend")), 0)
	})
}

func TestLostBeforeTheGrantArrives(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("acquire", first(func(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
			lease, err := ask()
			s.store.Expire("k") // reports to Request.Lost
			return lease, err
		}))
		if l, err := c.Acquire(t.Context(), "k"); l != nil || err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("got %v, %v", l, err)
		}
		synctest.Wait()
		equal(t, "clean-ups", len(s.seen("release")), 1)
		acquire(t, c)
	})
}

func TestMaxHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMaxHold(20*time.Second))
		l := acquire(t, c)
		<-l.Done()
		equal(t, "told at", s.now(), 20*time.Second)
		isLost(t, l.Err(), l, locker.ReasonMaxHold)
		equal(t, "extends", s.moments("extend"), seconds(3, 6, 9, 12, 15, 18))
		s.at(26 * time.Second)
		equal(t, "held at the server while its last TTL lasts", len(s.store.Holdings()), 1)
		s.at(40 * time.Second)
		equal(t, "released", s.moments("release"), seconds(27))
		equal(t, "extends after the loss", len(s.seen("extend")), 6)
		equal(t, "held in the end", len(s.store.Holdings()), 0)
	})
}

// What a lock that has ended would wait for, Close does not.
func TestCloseAfterAMaxHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMaxHold(5*time.Second))
		l := acquire(t, c)
		<-l.Done()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		equal(t, "closed at", s.now(), 5*time.Second)
		equal(t, "released", s.moments("release"), seconds(5))
	})
}

func TestMaxHoldCountsSuspend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := &napping{spy: newSpy(t)}
		l := acquire(t, newClient(t, n, locker.WithMaxHold(5*time.Second)))
		n.at(time.Second)
		n.suspend(4 * time.Second)
		isLost(t, l.Err(), l, locker.ReasonMaxHold)
	})
}

func TestTokenIsTheGrants(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		token := l.Token()
		s.store.Expire("k")
		next := acquire(t, c)
		if next.Token() <= token {
			t.Errorf("token %d after %d", next.Token(), token)
		}
		equal(t, "token of the lost lock", l.Token(), token)
		equal(t, "key", l.Key(), "k")
		isLost(t, l.Release(t.Context()), l, locker.ReasonTaken)
		synctest.Wait()
		if err := next.Err(); err != nil {
			t.Error("the release of a lost lock hurt the next:", err)
		}
		equal(t, "holder", s.store.Holdings()[0].Token, next.Token())
	})
}

func TestContextHasTheValuesOfAcquiresCtxOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		type name struct{}
		_, c := setup(t)
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), name{}, "value"), time.Second)
		l, err := c.Acquire(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		time.Sleep(2 * ttl)
		if err := l.Context().Err(); err != nil {
			t.Error("the lock ended with the ctx of its acquire:", err)
		}
		if _, ok := l.Context().Deadline(); ok {
			t.Error("the lock's context has a deadline")
		}
		equal(t, "value", l.Context().Value(name{}), any("value"))
		child, stop := context.WithCancel(l.Context())
		defer stop()
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-child.Done()
		equal(t, "cause", context.Cause(child), locker.ErrReleased)
		equal(t, "Err", l.Err(), locker.ErrReleased)
	})
}

func TestBindEndsWithEither(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		reason := errors.New("the program stops")
		ctx, cancel := context.WithCancelCause(t.Context())
		first, stop := l.Bind(ctx)
		defer stop()
		second, stop := l.Bind(t.Context())
		defer stop()
		third, stop := l.Bind(t.Context())
		stop()
		equal(t, "after its own cancel", context.Cause(third), context.Canceled)
		cancel(reason)
		<-first.Done()
		equal(t, "cause", context.Cause(first), reason)
		if err := errors.Join(second.Err(), l.Err()); err != nil {
			t.Error("the cancel of one context ended more:", err)
		}
		s.store.Expire("k")
		<-second.Done()
		isLost(t, context.Cause(second), l, locker.ReasonTaken)
		equal(t, "cause of the first", context.Cause(first), reason)
	})
}

func TestExtend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		s.at(time.Second)
		if err := l.Extend(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "deadline", l.Deadline().Sub(s.made), time.Second+trust)
		s.at(4*time.Second + 1)
		equal(t, "the heartbeat counts from there", s.moments("extend"), seconds(1, 4))

		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		if err := l.Extend(cancelled); !errors.Is(err, context.Canceled) || errors.Is(err, locker.ErrLost) {
			t.Error("with a cancelled ctx:", err)
		}
		equal(t, "requests under a cancelled ctx", len(s.seen("extend")), 2)

		s.on("extend", first(refused))
		if err := l.Extend(t.Context()); !errors.Is(err, errRefused) || errors.Is(err, locker.ErrLost) {
			t.Error("unknown:", err)
		}
		if err := l.Err(); err != nil {
			t.Error("an unknown outcome ended the lock:", err)
		}

		s.on("extend", first(answers(locker.ErrLost)))
		isLost(t, l.Extend(t.Context()), l, locker.ReasonTaken)
		isLost(t, l.Err(), l, locker.ReasonTaken)

		l = acquire(t, c)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		asked := len(s.seen("extend"))
		if err := l.Extend(t.Context()); !errors.Is(err, locker.ErrReleased) || !errors.Is(err, locker.ErrLost) {
			t.Error("after a release:", err)
		}
		equal(t, "requests after a release", len(s.seen("extend")), asked)
	})
}

// An Extend that hangs keeps no Release waiting.
func TestReleaseEndsAnExtend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		s.on("extend", always(hung))
		answered := make(chan error, 1)
		go func() { answered <- l.Extend(context.Background()) }()
		s.at(time.Second)
		if err := l.Release(t.Context()); err != nil {
			t.Error("Release:", err)
		}
		equal(t, "released at", s.now(), time.Second)
		if err := <-answered; !errors.Is(err, locker.ErrReleased) {
			t.Error("Extend:", err)
		}
	})
}
