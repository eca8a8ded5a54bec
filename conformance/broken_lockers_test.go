package conformance

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var brokenLockers = []faultyLocker{
	{name: "release without owner check", rows: []string{"late-release", "release-twice", "release-is-idempotent"}, server: releaseWithoutOwner},
	{name: "extend without owner check", rows: []string{"late-extend", "extend-is-idempotent"}, server: extendWithoutOwner},
	{name: "extend that re-creates", rows: []string{"evicted", "no-resurrection"}, server: extendThatRecreates(true), promises: noLossReport},
	{name: "extend that re-creates a free key", rows: []string{"evicted", "no-resurrection"}, server: extendThatRecreates(false), promises: noLossReport},
	{name: "deadline from the reply", rows: []string{"conservative-deadline"}, client: always(deadlineFromReply)},
	{name: "no deadline timer", rows: []string{"lost-before-freed", "hang", "server-pause", "early-warning"}, client: always(renewedWithoutAnswer)},
	{name: "one error means lost", rows: []string{"blip"}, client: always(errorMeansLost)},
	{name: "heartbeat survives release", rows: []string{"quiet-after-release"}, client: always(heartbeatOfItsOwn)},
	{name: "expired lease returned", rows: []string{"slow-grant"}, client: always(grantFromReply)},
	{name: "token of the shared counter", rows: []string{"token-is-the-grants"}, server: sharedCounter},
	{name: "token reset by a restart", rows: []string{"restart", "restart-without-data", "token-survives-crash"}, forgets: true},
	{name: "lock kept on a timed-out wait", rows: []string{"wait-bound-race", "late-acquire", "ambiguous-acquire"}, server: always(waitGoesOn)},
	{name: "same client enters twice", rows: []string{"exclusive-same-client"}, server: always(reentrant)},
	{name: "a dead waiter inherits", rows: []string{"dead-waiter", "dead-waiters"}, server: always(waiterNeverExpires)},
	{name: "notification without fallback", rows: []string{"lost-wakeup"}, client: wakeUps(0), promises: fallback},
	{name: "deaf after a cut", rows: []string{"wakeups-return"}, client: deafAfterACut(longFallback), promises: slowFallback},
	{name: "early free", rows: []string{"no-heartbeat", "max-hold"}, server: always(ttlAtServer(half))},
	{name: "key aliasing", rows: []string{"keys-are-independent"}, server: always(renamesKeys(strings.ToLower))},
	{name: "a repeated release answered as lost", rows: []string{"ambiguous-release"}, server: releasesOnce},
	{name: "a heartbeat that keeps neighbours alive", rows: []string{"shared-timer", "release-lost-in-blip"}, server: always(extendsAll)},

	{name: "two holders now and then", rows: []string{"belief-windows", "belief-windows-under-faults", "linearizable"}, server: secondHolders},
	{name: "polls slowly", rows: []string{"handover", "vanished-holder"}, client: polls(func(int) time.Duration { return 2 * time.Second })},
	{name: "polls", rows: []string{"handover"}, client: polls(func(int) time.Duration { return 60 * time.Millisecond })},
	{name: "no order", rows: []string{"fair"}, client: polls(func(int) time.Duration { return 10 * time.Millisecond })},
	{name: "one starves", rows: []string{"fair"}, client: polls(oneStarves), promises: notFair},
	{name: "a client waits twice", rows: []string{"one-remote-waiter"}, server: always(waitsTwice)},
	{name: "waiters block the heartbeat", rows: []string{"small-pool"}, client: always(fewAtOnce)},
	{name: "late free", rows: []string{"dropped-locker"}, server: always(ttlAtServer(triple))},
	{name: "a disconnect that frees nothing", rows: []string{"dropped-locker"}, promises: freesOnDisconnect},
	{name: "every try is a request of its own", rows: []string{"acquire-is-idempotent"}, server: eachTryIsNew},
	{name: "a retry counts from its own sending", rows: []string{"acquire-is-idempotent"}, server: always(grantFromReply)},
	{name: "a request that was over comes back", rows: []string{"acquire-is-idempotent"}, server: always(comesBack)},
	{name: "close waits for answers", rows: []string{"close"}, client: always(closeWaitsForAnswers)},
	{name: "close leaves its waits in the queue", rows: []string{"close"}, server: closeLeavesWaits},

	{name: "release that frees now and then", rows: []string{"one-release-frees"}, server: always(releasesNowAndThen)},
	{name: "the deadline of the call ends the hold", rows: []string{"acquire-ctx-is-not-the-hold"}, client: always(deadlineEndsHold)},
	{name: "a ctx that ends frees the neighbours", rows: []string{"neighbours-survive"}, client: always(ctxEndsAll)},
	{name: "slow to give up", rows: []string{"wait-bound", "cancel-waiting"}, client: always(slowToGiveUp)},
	{name: "a wait that forgets that the key was held", rows: []string{"wait-bound"}, client: always(forgetsHeld)},
	{name: "no answer counts as held", rows: []string{"held-is-known"}, client: always(silenceIsHeld)},
	{name: "sends for a ctx that is done", rows: []string{"cancelled-before"}, client: always(sendsAnyway)},
	{name: "extend that asks nobody", rows: []string{"heartbeat-holds"}, client: always(asksNobody)},
	{name: "never well again", rows: []string{"healthy-after-loss"}, client: always(neverWell)},
	{name: "release that always says yes", rows: []string{"release-while-down"}, client: always(alwaysYes)},
	{name: "one key is not given up", rows: []string{"locks-are-not-forgotten"}, client: always(oneIsNotGivenUp)},
	{name: "trusts for ever", rows: []string{"compensation", "no-heartbeat"}, client: always(trustsForEver)},
	{name: "start by the wall clock", rows: []string{"suspend"}, client: always(startByWallClock)},
	{name: "the same token after an expiry", rows: []string{"tokens-increase"}, server: sameTokenAfterExpiry},
	{name: "things are left for ever", rows: []string{"no-leftovers"}, server: always(leavesThings)},

	{name: "a waiter counts from the reply", rows: []string{"waited-grant"}, client: always(waiterCountsFromReply)},
	{name: "the timer of a waiter begins with its wait", rows: []string{"waited-grant"}, server: always(timerOfTheWait)},
	{name: "a wait cannot be withdrawn", rows: []string{"withdrawn-while-waiting"}, server: always(waitIsNotWithdrawn)},
	{name: "release in two steps", rows: []string{"late-by-a-moment"}, server: inTwoSteps(false)},
	{name: "extend in two steps", rows: []string{"late-by-a-moment"}, server: inTwoSteps(true)},
	{name: "extend that re-creates now and then", rows: []string{"no-resurrection"}, server: always(recreatesNowAndThen)},
	{name: "extend that re-creates after a restart", rows: []string{"restart"}, server: always(recreatesAfterRestart)},
	{name: "freed a little early", rows: []string{"ttl-per-call", "dropped-locker"}, server: always(ttlAtServer(little))},
	{name: "a short TTL becomes a long one", rows: []string{"ttl-per-call"}, server: always(ttlAtServer(notShort))},
	{name: "a very long TTL overflows", rows: []string{"ttl-per-call"}, server: always(ttlAtServer(overflows))},
	{name: "a reset is answered as held", rows: []string{"ambiguous-acquire"}, client: always(resetMeansHeld)},
	{name: "one who asks once overtakes", rows: []string{"fair"}, client: overtakes},
	{name: "errors without a call", rows: []string{"faults-are-real-cut", "keys-are-independent"}, client: always(bareErrors)},
	{name: "a grant of another request", rows: []string{"exclusive"}, client: always(grantOfAnother)},
	{name: "capabilities that change", rows: []string{"exclusive"}, promises: changing()},
	{name: "goroutines pile up", rows: []string{"nothing-piles-up"}, client: always(pilesUp(false))},
	{name: "connections pile up", rows: []string{"nothing-piles-up"}, client: always(pilesUp(true))},

	{name: "the label of the first holder", rows: []string{"exclusive"}, server: firstLabel},
	{name: "labels are cut", rows: []string{"exclusive", "inspect"}, server: always(cutLabels)},
	{name: "the time of another TTL remains", rows: []string{"exclusive"}, server: always(remainsOfAnother)},
	{name: "lost is called at release", rows: []string{"lost-is-called-once"}, server: lostAtRelease},
	{name: "lost is called twice", rows: []string{"lost-is-called-once"}, server: always(lostTwice)},
	{name: "inspect that knows nothing", rows: []string{"inspect"}, server: sees(nothing)},
	{name: "inspect that is late", rows: []string{"inspect"}, server: sees(theFirst())},
	{name: "list that forgets one", rows: []string{"list"}, server: listsBut},
	{name: "list that does not end", rows: []string{"list"}, server: listsOn},
	{name: "break without a look at the token", rows: []string{"break", "token-range"}, server: breaksAnything},
}

// mendedLockers are made like broken ones, and pass.
var mendedLockers = []faultyLocker{
	{name: "server that is killed", rows: []string{"restart", "restart-without-data", "token-survives-crash"}},
	{name: "notification with fallback", rows: []string{"lost-wakeup", "handover", "vanished-holder"}, client: wakeUps(fallbackPeriod), promises: fallback},
	{name: "notification that returns", rows: []string{"wakeups-return"}, client: wakeUps(longFallback), promises: slowFallback},
	{name: "fast polls", rows: []string{"fair"}, client: polls(func(int) time.Duration { return time.Millisecond }), promises: notFair},
}

// always makes a fault without a state that Lockers share.
func always(f fault) func() fault { return func() fault { return f } }

func noLossReport(caps *locker.Capabilities) { caps.ReportsLoss = false }

func freesOnDisconnect(caps *locker.Capabilities) { caps.EarlyFree |= locker.EarlyFreeDisconnect }

func notFair(caps *locker.Capabilities) { caps.Fair, caps.Notifies = false, false }

const fallbackPeriod = 50 * time.Millisecond

// longFallback is so long that nobody takes a poll for a wake-up, however much the suite allows a slow machine.
var longFallback = 4 * slack()

func slowFallback(caps *locker.Capabilities) { caps.Fallback, caps.Fair = 2*longFallback, false }

func fallback(caps *locker.Capabilities) { caps.Fallback, caps.Fair = 4*fallbackPeriod, false }

// leases is a set of leases that some Lockers share.
type leases struct {
	mu    sync.Mutex
	known map[string]locker.Lease
}

func (s *leases) put(name string, lease locker.Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = make(map[string]locker.Lease)
	}
	s.known[name] = lease
}

func (s *leases) get(name string) (locker.Lease, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lease, ok := s.known[name]
	return lease, ok
}

func (s *leases) drop(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, name)
}

func (s *leases) all() []locker.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.known))
}

// remember notes the newest grant of each key.
func (s *leases) remember(f *faulty) {
	acquire := f.acquire
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := acquire(ctx, req)
		if err == nil {
			s.put(req.Key, lease)
		}
		return lease, err
	}
}

func releaseWithoutOwner() fault {
	newest := new(leases)
	return func(f *faulty) {
		newest.remember(f)
		f.release = func(ctx context.Context, lease locker.Lease) error {
			if holder, ok := newest.get(lease.Key); ok && lease.Token != 0 {
				lease = holder
			}
			return f.Locker.Release(ctx, lease)
		}
	}
}

func extendWithoutOwner() fault {
	newest := new(leases)
	return func(f *faulty) {
		newest.remember(f)
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			holder, _ := newest.get(lease.Key)
			holder.TTL = lease.TTL
			fresh, err := f.Locker.Extend(ctx, holder)
			fresh.ID, fresh.Token = lease.ID, lease.Token
			return fresh, err
		}
	}
}

// extendThatRecreates writes the lock again when it is gone, and takes it away from a successor or not.
func extendThatRecreates(steals bool) func() fault {
	return func() fault {
		newest := new(leases)
		return func(f *faulty) {
			newest.remember(f)
			acquire := f.acquire
			f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
				req.Lost = nil
				return acquire(ctx, req)
			}
			f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
				fresh, err := f.Locker.Extend(ctx, lease)
				if !errors.Is(err, locker.ErrLost) {
					return fresh, err
				}
				if holder, ok := newest.get(lease.Key); ok && steals {
					_ = f.Locker.Release(ctx, holder) // it may be over too
				}
				fresh, err = acquire(ctx, locker.Request{Key: lease.Key, ID: lease.ID, TTL: lease.TTL, NoWait: true})
				if errors.Is(err, locker.ErrHeld) {
					return lease, locker.ErrLost
				}
				fresh.Token = lease.Token
				return fresh, err
			}
		}
	}
}

func deadlineFromReply(f *faulty) {
	grantFromReply(f)
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		fresh, err := f.Locker.Extend(ctx, lease)
		fresh.Start = time.Now()
		return fresh, err
	}
}

func grantFromReply(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		lease.Start = time.Now()
		return lease, err
	}
}

// renewedWithoutAnswer takes every renewal for done that it could send. So the deadline never comes.
func renewedWithoutAnswer(f *faulty) {
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		ctx, cancel := context.WithTimeout(ctx, lease.TTL/10)
		defer cancel()
		fresh, err := f.Locker.Extend(ctx, lease)
		if errors.Is(err, context.DeadlineExceeded) {
			fresh = lease
			fresh.Start, err = time.Now(), nil
		}
		return fresh, err
	}
}

func errorMeansLost(f *faulty) {
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		fresh, err := f.Locker.Extend(ctx, lease)
		if err != nil {
			err = locker.ErrLost
		}
		return fresh, err
	}
}

// heartbeatOfItsOwn does not know of releases.
func heartbeatOfItsOwn(f *faulty) {
	ctx, cancel := context.WithCancel(context.Background())
	var heartbeats sync.WaitGroup
	f.close = func() {
		cancel()
		heartbeats.Wait()
	}
	f.acquire = func(call context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(call, req)
		if err == nil {
			heartbeats.Go(func() {
				for sometimes(ctx, req.TTL/4, req.TTL/3) {
					_, _ = f.Locker.Extend(ctx, lease)
				}
			})
		}
		return lease, err
	}
}

func sharedCounter() fault {
	var newest atomic.Uint64
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			lease, err := f.Locker.Acquire(ctx, req)
			if err == nil {
				newest.Store(lease.Token)
			}
			return lease, err
		}
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			fresh, err := f.Locker.Extend(ctx, lease)
			fresh.Token = newest.Load()
			return fresh, err
		}
	}
}

// waitGoesOn leaves the queue a little after it has said so, and has no clean-up.
func waitGoesOn(f *faulty) {
	type answer struct {
		lease locker.Lease
		err   error
	}
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		wait, leave := context.WithCancel(context.WithoutCancel(ctx))
		answers := make(chan answer, 1)
		go func() {
			lease, err := f.Locker.Acquire(wait, req)
			answers <- answer{lease, err}
		}()
		select {
		case a := <-answers:
			leave()
			return a.lease, a.err
		case <-ctx.Done():
			time.AfterFunc(20*time.Millisecond, leave)
			return locker.Lease{}, &locker.Error{Op: "acquire", Key: req.Key, Err: ctx.Err()}
		}
	}
	f.release = func(ctx context.Context, lease locker.Lease) error {
		if lease.Token == 0 {
			return nil
		}
		return f.Locker.Release(ctx, lease)
	}
}

// reentrant is a session that may enter again what it has locked.
func reentrant(f *faulty) {
	held := new(leases)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		if lease, ok := held.get(req.Key); ok {
			return lease, nil
		}
		lease, err := f.Locker.Acquire(ctx, req)
		if err == nil {
			held.put(req.Key, lease)
		}
		return lease, err
	}
	f.release = func(ctx context.Context, lease locker.Lease) error {
		held.drop(lease.Key)
		return f.Locker.Release(ctx, lease)
	}
}

// waiterNeverExpires gives those who had to wait a lock that has no timer.
func waiterNeverExpires(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		atOnce := req
		atOnce.NoWait = true
		lease, err := f.Locker.Acquire(ctx, atOnce)
		if req.NoWait || !errors.Is(err, locker.ErrHeld) {
			return lease, err
		}
		if lease, err = f.Locker.Acquire(ctx, req); err == nil {
			go func() { // ends with the lock or the connection
				for err := error(nil); err == nil && sometimes(context.Background(), req.TTL/4, req.TTL/3); {
					_, err = f.Locker.Extend(context.Background(), lease)
				}
			}()
		}
		return lease, err
	}
}

// ttlAtServer keeps locks for another time than it says.
func ttlAtServer(real func(ttl time.Duration) time.Duration) fault {
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			said := req.TTL
			req.TTL = real(said)
			lease, err := f.Locker.Acquire(ctx, req)
			lease.TTL = said
			return lease, err
		}
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			said := lease.TTL
			lease.TTL = real(said)
			fresh, err := f.Locker.Extend(ctx, lease)
			fresh.TTL = said
			return fresh, err
		}
	}
}

func half(ttl time.Duration) time.Duration { return ttl / 2 }

func triple(ttl time.Duration) time.Duration { return 3 * ttl }

// renamesKeys keeps locks under other names at the server.
func renamesKeys(name func(key string) string) fault {
	return func(f *faulty) {
		f.opaque = true
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			key := req.Key
			req.Key = name(key)
			lease, err := f.Locker.Acquire(ctx, req)
			lease.Key = key
			return lease, err
		}
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			key := lease.Key
			lease.Key = name(key)
			fresh, err := f.Locker.Extend(ctx, lease)
			fresh.Key = key
			return fresh, err
		}
		f.release = func(ctx context.Context, lease locker.Lease) error {
			lease.Key = name(lease.Key)
			return f.Locker.Release(ctx, lease)
		}
	}
}

func releasesOnce() fault {
	released := new(leases)
	return func(f *faulty) {
		f.release = func(ctx context.Context, lease locker.Lease) error {
			if _, again := released.get(lease.ID); again && lease.Token != 0 {
				return locker.ErrLost
			}
			err := f.Locker.Release(ctx, lease)
			if err == nil {
				released.put(lease.ID, lease)
			}
			return err
		}
	}
}

// extendsAll renews whatever lives on the same connection.
func extendsAll(f *faulty) {
	mine := new(leases)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if err == nil {
			mine.put(lease.ID, lease)
		}
		return lease, err
	}
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		for _, neighbour := range mine.all() {
			_, _ = f.Locker.Extend(ctx, neighbour) // it may be over
		}
		return f.Locker.Extend(ctx, lease)
	}
}
