package locker_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
)

func TestReleaseFreesAndIsQuietAfterwards(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		s.at(10 * time.Second)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "held", len(s.store.Holdings()), 0)
		<-l.Done()
		equal(t, "Err", l.Err(), locker.ErrReleased)
		equal(t, "cause", context.Cause(l.Context()), locker.ErrReleased)
		if err := l.Release(t.Context()); err != nil {
			t.Error("the second release:", err)
		}
		s.at(10 * ttl)
		equal(t, "releases", s.moments("release"), seconds(10))
		equal(t, "extends", s.moments("extend"), seconds(3, 6, 9))
	})
}

func TestReleaseUnderADeadCtx(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := l.Release(ctx); err != nil {
			t.Fatal(err)
		}
		equal(t, "held", len(s.store.Holdings()), 0)
	})
}

// A release waits for the renewals that are under way, which its beginning has ended. The spy watches the order.
func TestReleaseWaitsForRenewals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", always(deaf(time.Second, time.Second)))
		l := acquire(t, c)
		s.at(3 * time.Second)
		synctest.Wait()
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "released at", s.moments("release"), seconds(5))

		s.on("extend", always(hung))
		l = acquire(t, c)
		s.at(9 * time.Second)
		synctest.Wait()
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "released at", s.moments("release"), seconds(5, 9))
	})
}

func TestReleaseRacesTheHeartbeat(t *testing.T) {
	for i := range 500 {
		bubble(t, func(t *testing.T) {
			s, c := setup(t)
			s.on("extend", always(travels(0, time.Duration(i%7)*time.Millisecond)))
			l := acquire(t, c)
			s.at(ttl/3 + time.Duration(i%10)*time.Millisecond)
			if err := l.Release(t.Context()); err != nil {
				t.Error(err)
			}
			equal(t, "held", len(s.store.Holdings()), 0)
			requests := len(s.seen("extend")) + len(s.seen("release"))
			s.at(3 * ttl)
			equal(t, "requests in the end", len(s.seen("extend"))+len(s.seen("release")), requests)
		})
	}
}

func TestReleaseRetriesUntilItsTimeout(t *testing.T) {
	const timeout = 3 * time.Second
	for name, f := range map[string]fate{"refused": refused, "hung": hung} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s, c := setup(t, locker.WithReleaseTimeout(timeout))
				s.on("release", always(f))
				l := acquire(t, c)
				err := l.Release(t.Context())
				if err == nil || errors.Is(err, locker.ErrLost) {
					t.Errorf("unknown outcome: %v", err)
				}
				if s.now() > timeout {
					t.Errorf("it took %v", s.now())
				}
				tries := s.moments("release")
				if len(tries) < 3 {
					t.Errorf("tries at %v", tries)
				}
				began := s.now()
				equal(t, "the second release", l.Release(t.Context()), err)
				equal(t, "and its time", s.now(), began)
				s.at(3 * ttl)
				equal(t, "tries in the end", s.moments("release"), tries)
				equal(t, "extends", len(s.seen("extend")), 0)
				equal(t, "held in the end", len(s.store.Holdings()), 0)
			})
		})
	}
}

// The whole of a release is bounded, the wait for a renewal that heeds no ctx included.
func TestReleaseTimeoutIncludesTheWaitForRenewals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithReleaseTimeout(3*time.Second))
		s.on("extend", always(deaf(0, 2*time.Second)))
		s.on("release", always(hung))
		l := acquire(t, c)
		s.at(3 * time.Second)
		synctest.Wait()
		if err := l.Release(t.Context()); err == nil {
			t.Error("nil from a server that hangs")
		}
		if s.now() > 6*time.Second {
			t.Errorf("it took %v", s.now()-3*time.Second)
		}
	})
}

func TestLostAnswerOfAReleaseIsNoLoss(t *testing.T) {
	for name, f := range map[string]fate{"reset": reset, "swallowed": swallowed} {
		for _, second := range []fate{delivered, answers(locker.ErrLost)} {
			bubble(t, func(t *testing.T) {
				s, c := setup(t)
				s.on("release", first(f, second))
				l := acquire(t, c)
				if err := l.Release(t.Context()); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				equal(t, "tries", len(s.seen("release")), 2)
			})
		}
	}
}

func TestReleaseOfALockThatIsGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("release", always(answers(locker.ErrLost)))
		l := acquire(t, c)
		err := l.Release(t.Context())
		isLost(t, err, l, locker.ReasonTaken)
		equal(t, "the second release", l.Release(t.Context()), err)
		equal(t, "requests", len(s.seen("release")), 1)
	})
}

func TestReleaseAfterALossCleansUpAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMaxHold(4*time.Second))
		l := acquire(t, c)
		<-l.Done()
		s.at(5 * time.Second)
		equal(t, "releases before", len(s.seen("release")), 0)
		isLost(t, l.Release(t.Context()), l, locker.ReasonMaxHold)
		synctest.Wait()
		equal(t, "releases", s.moments("release"), seconds(5))
		isLost(t, l.Release(t.Context()), l, locker.ReasonMaxHold)
		s.at(3 * ttl)
		equal(t, "releases in the end", s.moments("release"), seconds(5))
	})
}

func TestReleasesAtOnceAnswerTheSame(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("release", always(travels(time.Second, 0)))
		l := acquire(t, c)
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				if err := l.Release(t.Context()); err != nil {
					t.Error(err)
				}
				equal(t, "answered at", s.now(), time.Second)
			})
		}
		all.Wait()
		equal(t, "requests", len(s.seen("release")), 1)
	})
}

func TestMinHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMinHold(5*time.Second))
		l := acquire(t, c)
		s.at(time.Second)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "released at once", s.now(), time.Second)
		equal(t, "Err", l.Err(), locker.ErrReleased)
		next := acquire(t, c)
		equal(t, "free at", s.now(), 5*time.Second)
		equal(t, "extends", len(s.seen("extend")), 0)
		s.at(11 * time.Second)
		if err := next.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "held for longer than the minimum", s.moments("release"), seconds(5, 11))
	})
}

// The server must keep the lock although this process may die, and does so without being asked: nothing is sent before the
// minimum hold is over.
func TestMinHoldOfAWholeTTLReachesAtTheServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMinHold(ttl), locker.WithoutHeartbeat())
		s.on("acquire", always(travels(time.Second, time.Second)))
		l := acquire(t, c)
		s.at(4 * time.Second)
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.at(ttl - 1)
		equal(t, "holder", s.store.Holdings()[0].Token, l.Token())
		s.at(ttl)
		synctest.Wait()
		equal(t, "held", len(s.store.Holdings()), 0)
		equal(t, "extends", len(s.seen("extend")), 0)
		equal(t, "releases", s.moments("release"), []time.Duration{ttl})
	})
}

func TestMinHoldAfterALossIsOver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithMinHold(5*time.Second))
		l := acquire(t, c)
		s.store.Expire("k")
		synctest.Wait()
		isLost(t, l.Release(t.Context()), l, locker.ReasonTaken)
		acquire(t, c)
		equal(t, "free at", s.now(), 0)
	})
}
