package locker_test

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
)

// bubble runs a test in fake time.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestHeartbeatRenewsEveryThirdOfTheTTL(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		l := acquire(t, c)
		token := l.Token()
		s.at(10 * ttl)
		synctest.Wait()
		var want []time.Duration
		for at := ttl / 3; at <= 10*ttl; at += ttl / 3 {
			want = append(want, at)
		}
		equal(t, "extends", s.moments("extend"), want)
		equal(t, "deadline", l.Deadline().Sub(s.made), 10*ttl+trust)
		equal(t, "token", l.Token(), token)
		if err := l.Err(); err != nil {
			t.Error("Err:", err)
		}
	})
}

func TestHeartbeatOfOnesOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithHeartbeat(2*time.Second))
		acquire(t, c)
		s.at(9 * time.Second)
		equal(t, "extends", s.moments("extend"), seconds(2, 4, 6, 8))
	})
}

// A backend may grant more than was requested: then that counts.
func TestHeartbeatFollowsTheGrantedTTL(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("acquire", always(func(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
			lease, err := ask()
			lease.TTL = 12 * time.Second
			return lease, err
		}))
		l := acquire(t, c)
		equal(t, "deadline", l.Deadline().Sub(s.made), 12*time.Second-122*time.Millisecond)
		s.at(5 * time.Second)
		equal(t, "extends", s.moments("extend"), seconds(4))
		equal(t, "extended for", s.seen("extend")[0].lease.TTL, 12*time.Second)
	})
}

func TestUnansweredTriesOverlap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", always(hung))
		l := acquire(t, c)
		<-l.Done()
		equal(t, "told at", s.now(), trust)
		isLost(t, l.Err(), l, locker.ReasonExpired)
		// Half a period apart at first, then a third of what is left, and an eighth of a period at least.
		tries := seconds(3, 4.5, 5.969333333, 6.948888888, 7.601925925, 8.037283950, 8.412283950, 8.787283950)
		equal(t, "tries", s.moments("extend"), tries)
		s.at(2 * ttl)
		equal(t, "tries after the loss", s.moments("extend"), tries)
		equal(t, "the clean-up comes when the server's own time is over", s.moments("release"), seconds(9))
		equal(t, "deadline", l.Deadline().Sub(s.made), trust)
	})
}

// However often the heart beats, its tries reach over the whole of the lease: connections that hang until the deadline must
// not use them up.
func TestTriesOfAShortHeartbeatReachToTheEnd(t *testing.T) {
	for _, every := range []time.Duration{100 * time.Millisecond, time.Second, 2 * time.Second} {
		bubble(t, func(t *testing.T) {
			s, c := setup(t, locker.WithHeartbeat(every))
			s.on("extend", func(int) fate {
				if s.now() < ttl*2/3 {
					return hung
				}
				return delivered
			})
			l := acquire(t, c)
			s.at(2 * ttl)
			if err := l.Err(); err != nil {
				t.Errorf("a heartbeat of %v: %v, after tries at %v", every, err, s.moments("extend"))
			}
		})
	}
}

func TestLateAnswerCountsFromItsSend(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", func(n int) fate {
			if n == 1 {
				return travels(0, 5*time.Second)
			}
			return hung
		})
		l := acquire(t, c)
		s.at(8*time.Second - 1)
		equal(t, "deadline before the answer", l.Deadline().Sub(s.made), trust)
		s.at(8 * time.Second)
		synctest.Wait()
		equal(t, "deadline after it", l.Deadline().Sub(s.made), 3*time.Second+trust)
		<-l.Done()
		equal(t, "told at", s.now(), 3*time.Second+trust)
	})
}

func TestAnswerAfterTheDeadlineIsNoRescue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", first(deaf(0, trust-ttl/3+1), hung, hung, hung, hung, hung, hung, hung, hung, hung))
		l := acquire(t, c)
		<-l.Done()
		equal(t, "told at", s.now(), trust)
		s.at(2 * ttl)
		isLost(t, l.Err(), l, locker.ReasonExpired)
		equal(t, "deadline", l.Deadline().Sub(s.made), trust)
	})
}

// A server may answer at the very moment of expiry: what comes after the deadline that stood when it was asked does not
// count, even if the lock has been renewed meanwhile.
func TestAnswerAfterItsOwnDeadlineDoesNotCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", first(func(context.Context, func() (locker.Lease, error)) (locker.Lease, error) {
			time.Sleep(trust - ttl/3 + 1)
			return locker.Lease{Key: "k", TTL: ttl, Start: time.Now()}, nil
		}))
		l := acquire(t, c)
		s.at(trust + 1)
		synctest.Wait()
		equal(t, "extends", s.moments("extend"), seconds(3, 4.5, 7.5))
		equal(t, "deadline", l.Deadline().Sub(s.made), 7500*time.Millisecond+trust)
	})
}

func TestOlderAnswerTakesNoTrustAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", first(travels(0, 2*time.Second), delivered)) // sent at 3 and answered at 5, and at 4.5
		l := acquire(t, c)
		s.at(5*time.Second + 1)
		equal(t, "extends", s.moments("extend"), seconds(3, 4.5))
		equal(t, "deadline", l.Deadline().Sub(s.made), 4500*time.Millisecond+trust)
	})
}

func TestRoundTripOfAQuarterOfTheTTLRenews(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", always(travels(ttl/8, ttl/8)))
		l := acquire(t, c)
		s.at(20 * ttl)
		if err := l.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestFailuresAreRetriedWithJitterUntilTheDeadline(t *testing.T) {
	var spread time.Duration // between the first retries of the runs
	var earliest, latest time.Duration
	for run := range 20 {
		bubble(t, func(t *testing.T) {
			s, c := setup(t)
			s.on("extend", always(refused))
			l := acquire(t, c)
			<-l.Done()
			equal(t, "told at", s.now(), trust)
			isLost(t, l.Err(), l, locker.ReasonExpired)
			tries := s.moments("extend")
			equal(t, "first try", tries[0], ttl/3)
			const every = ttl / 3
			for i, at := range append(tries, trust)[1:] {
				gap := at - tries[i]
				if last := i == len(tries)-1; !last && gap < every/32 || gap > every*3/4 {
					t.Errorf("a pause of %v after try %d of %v", gap, i+1, tries)
				}
			}
			if run == 0 {
				earliest, latest = tries[1], tries[1]
			}
			earliest, latest = min(earliest, tries[1]), max(latest, tries[1])
			spread = latest - earliest
		})
	}
	if spread < 10*time.Millisecond {
		t.Errorf("the first retries of 20 runs lie within %v", spread)
	}
}

// The same for an outage in which nothing is answered.
func TestHangThatEndsBeforeTheDeadlineIsSurvived(t *testing.T) {
	for _, end := range []time.Duration{ttl / 2, ttl * 3 / 4, ttl * 9 / 10, trust - ttl/20} {
		bubble(t, func(t *testing.T) {
			s, c := setup(t)
			s.on("extend", func(int) fate {
				if s.now() < end {
					return hung
				}
				return delivered
			})
			l := acquire(t, c)
			s.at(2 * ttl)
			if err := l.Err(); err != nil {
				t.Errorf("a hang of %v: %v, after tries at %v", end, err, s.moments("extend"))
			}
		})
	}
}

func TestOutageThatEndsBeforeTheDeadlineIsSurvived(t *testing.T) {
	for _, end := range []time.Duration{ttl / 2, ttl * 3 / 4, ttl * 9 / 10, trust - ttl/20} {
		for range 25 {
			bubble(t, func(t *testing.T) {
				s, c := setup(t)
				s.on("extend", func(int) fate {
					if s.now() < end {
						return refused
					}
					return delivered
				})
				l := acquire(t, c)
				s.at(3 * ttl)
				if err := l.Err(); err != nil {
					t.Errorf("an outage of %v: %v, after tries at %v", end, err, s.moments("extend"))
				}
			})
		}
	}
}

// A try that hangs until its own deadline, or fails later than the next one has renewed, says nothing of the lease that
// the next one has got.
func TestStaleFailureIsNoLapse(t *testing.T) {
	fails := func(ctx context.Context, _ func() (locker.Lease, error)) (locker.Lease, error) {
		return locker.Lease{}, cmp.Or(sleep(ctx, 2*time.Second), errRefused)
	}
	for name, late := range map[string]fate{"hangs": hung, "fails": fails} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				warned := 0
				s, c := setup(t, locker.WithWarning(trust-ttl/10, func(*locker.Lock) { warned++ }))
				s.on("extend", first(late))
				acquire(t, c)
				s.at(4600 * time.Millisecond) // the second try has renewed
				synctest.Wait()
				warned = 0
				s.at(ttl + ttl/3)
				synctest.Wait()
				equal(t, "warnings", warned, 0)
				equal(t, "extends", s.moments("extend"), seconds(3, 4.5, 7.5, 10.5))
			})
		})
	}
}

func TestExtendThatItsCallerGivesUpIsNoFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		const patience = 70 * time.Millisecond
		s.on("extend", always(func(ctx context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
			if end, _ := ctx.Deadline(); time.Until(end) <= patience {
				return hung(ctx, ask)
			}
			return ask() // for the heartbeat
		}))
		l := acquire(t, c)
		for s.now() < 2*ttl {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if err := l.Extend(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			cancel()
		}
		if err := l.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestEvictionFoundByTheHeartbeat(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t)
		s.on("extend", first(delivered, answers(locker.ErrLost)))
		l := acquire(t, c)
		<-l.Done()
		equal(t, "told at", s.now(), 6*time.Second)
		isLost(t, context.Cause(l.Context()), l, locker.ReasonTaken)
		synctest.Wait()
		equal(t, "the lease is released all the same", s.moments("release"), seconds(6))
	})
}

func TestWithoutHeartbeat(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithoutHeartbeat())
		l := acquire(t, c)
		equal(t, "NoExtend", s.seen("acquire")[0].req.NoExtend, true)
		s.at(2 * time.Second)
		if err := l.Extend(t.Context()); err != nil {
			t.Fatal(err)
		}
		equal(t, "deadline", l.Deadline().Sub(s.made), 2*time.Second+trust)
		<-l.Done()
		equal(t, "told at", s.now(), 2*time.Second+trust)
		equal(t, "extends", s.moments("extend"), seconds(2))
		isLost(t, l.Extend(t.Context()), l, locker.ReasonExpired)
		equal(t, "extends after the loss", s.moments("extend"), seconds(2))

		acquire(t, c, locker.WithHeartbeat(time.Second))
		equal(t, "NoExtend with a heartbeat for one call", s.seen("acquire")[1].req.NoExtend, false)
	})
}

func TestWarningOncePerLapse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var at []time.Duration
		var s *spy
		s, c := setup(t, locker.WithWarning(4*time.Second, func(l *locker.Lock) {
			if l.Err() != nil {
				t.Error("warned after the loss")
			}
			at = append(at, s.now())
		}))
		var down atomic.Bool
		down.Store(true)
		s.on("extend", func(int) fate {
			if down.Load() {
				return refused
			}
			return delivered
		})
		l := acquire(t, c)
		s.at(trust - 2*time.Second)
		synctest.Wait()
		equal(t, "first lapse", at, []time.Duration{trust - 4*time.Second})
		down.Store(false)
		s.at(60 * time.Second)
		synctest.Wait()
		equal(t, "after its end", len(at), 1)

		down.Store(true)
		<-l.Done()
		synctest.Wait()
		equal(t, "both", at, []time.Duration{trust - 4*time.Second, s.now() - 4*time.Second})
	})
}

func TestWarningWhenTriesAreNotAnswered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var at []time.Duration
		var s *spy
		s, c := setup(t, locker.WithWarning(2*time.Second, func(*locker.Lock) { at = append(at, s.now()) }))
		s.on("extend", always(hung))
		l := acquire(t, c)
		<-l.Done()
		synctest.Wait()
		equal(t, "warned at", at, []time.Duration{trust - 2*time.Second})
	})
}

// In good times less than WithWarning's time may be left between two heartbeats, and nothing is wrong.
func TestNoWarningWhileRenewalsSucceed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithWarning(8*time.Second, func(*locker.Lock) { t.Error("warned") }))
		s.on("extend", always(travels(time.Second/10, time.Second/10)))
		acquire(t, c)
		s.at(10 * ttl)
	})
}

func TestWarningWithoutHeartbeat(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var at []time.Duration
		var s *spy
		s, c := setup(t, locker.WithoutHeartbeat(), locker.WithWarning(time.Second, func(*locker.Lock) { at = append(at, s.now()) }))
		l := acquire(t, c)
		<-l.Done()
		synctest.Wait()
		equal(t, "warned at", at, []time.Duration{trust - time.Second})
	})
}
