package conformance

import (
	"crypto/rand"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// noExtend makes a request say that its lease will not be extended.
func noExtend(req *locker.Request) { req.NoExtend = true }

// word is a text of n letters and digits that nobody else has.
func word(n int) string { return rand.Text()[:n] }

// soon is how long a call takes at most that has nothing to wait for: R + s.
func (t *trial) soon() time.Duration { return t.rtt + t.slack }

// parallel calls f for 0 to n-1, a few at a time, and ends the row if one of them failed.
func (t *trial) parallel(n int, f func(i int)) {
	var next atomic.Int64
	var group sync.WaitGroup
	for range min(n, 16) {
		group.Go(func() {
			defer t.recovered()
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	group.Wait()
	if t.failed() {
		runtime.Goexit()
	}
}

// failed is true once the row has failed.
func (t *trial) failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.outcome == Failed
}

// promptly fails the row if what f measures takes longer than limit three times in a row: a busy machine may be late
// once, and a slow backend is late every time.
func (t *trial) promptly(what string, limit time.Duration, f func(try int) time.Duration) {
	const tries = 3
	var took [tries]time.Duration
	for i := range tries {
		if took[i] = f(i); took[i] <= limit {
			return
		}
	}
	t.Errorf("%s took %v; the limit is %v", what, took, limit)
}

// answered repeats a call until its outcome is known: after a reset each connection of a pool may fail once.
func (t *trial) answered(call func() error) (err error) {
	t.eventually(t.TTL+t.slack, "the call is answered", func() bool {
		err = call()
		return known(err)
	})
	return err
}

// known is true for the answers that tell what became of the lock.
func known(err error) bool {
	return err == nil || errors.Is(err, locker.ErrLost) || errors.Is(err, locker.ErrHeld)
}

// receive waits for what ought to come soon, and fails the row if it does not.
func receive[T any](t *trial, from <-chan T, within time.Duration, what string) (got T) {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case got = <-from:
	case <-timer.C:
		t.Fatalf("%s: not within %v", what, within)
	}
	return got
}

// kept is the moment before which the key of a lease that nobody extends cannot be granted to others. Half a
// thousandth is left to the server's clock, which may be one that is being corrected.
func kept(lease locker.Lease) time.Time { return lease.Start.Add(lease.TTL - lease.TTL/2000) }

// expires fails the row if the key of a lease that nobody extends is free before its TTL is over, or still held by
// T + G + X + s.
func (t *trial) expires(observer locker.Locker, lease locker.Lease) {
	t.expiresBy(observer, lease, lease.Start.Add(lease.TTL+t.caps.Granularity+t.caps.Expiry+t.slack))
}

// expiresBy is expires with another limit. It looks more and more often towards the end of the TTL, for a lock that is
// freed a little too early.
func (t *trial) expiresBy(observer locker.Locker, lease locker.Lease, limit time.Time) {
	end := kept(lease)
	for now := time.Now(); now.Before(end); now = time.Now() {
		if early, held := t.try(observer, lease.Key); !held && time.Now().Before(end) {
			t.Errorf("%q is free (granted with token %d) %v before its TTL of %v is over", lease.Key, early.Token, time.Until(end), lease.TTL)
			t.release(observer, early)
			return
		} else if !held {
			t.release(observer, early)
			return
		}
		t.pass(max(time.Millisecond, min(lease.TTL/10, time.Until(end)/2)))
	}
	next, _ := t.freeWithin(observer, lease.Key, lease.Start, limit.Sub(lease.Start))
	t.release(observer, next)
}

// inspect tells who holds key; the answer is empty where the backend cannot tell.
func (t *trial) inspect(observer locker.Locker, key string) locker.Holding {
	inspector, ok := locker.As[locker.Inspector](observer)
	if !ok {
		return locker.Holding{Key: key, Waiters: -1}
	}
	holding, err := inspector.Inspect(t.ctx, key)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("inspect %q: %v", key, err)
	} else if err != nil {
		holding = locker.Holding{Key: key, Waiters: -1}
	}
	return holding
}

// waiting waits until n requests for key wait at the server. Where the backend cannot tell how many do, it is enough
// that each of the links has carried a request since it was counted.
func (t *trial) waiting(observer locker.Locker, key string, n int, links ...*link) {
	t.eventually(t.TTL+t.slack, "the requests wait at the server", func() bool {
		if waiters := t.inspect(observer, key).Waiters; waiters >= 0 {
			return waiters == n
		}
		for _, l := range links {
			if l.net.Stats().Requests == l.requests {
				return false
			}
		}
		return true
	})
}

// link is a Network with its count of requests before a call.
type link struct {
	net      *Network
	requests int64
}

// asked counts the requests on a link before a call.
func asked(net *Network) *link { return &link{net, net.Stats().Requests} }

// withdrawn fails the row if something of a request that is over stands in the way of the next, or still waits.
func (t *trial) withdrawn(observer locker.Locker, key string) {
	lease, _ := t.freeWithin(observer, key, time.Now(), t.soon())
	t.release(observer, lease)
	if waiters := t.inspect(observer, key).Waiters; waiters > 0 {
		t.Errorf("%d requests for %q wait still: all are over", waiters, key)
	}
}

// isHeld tells whether the observer finds the key held. If it is free it stays so.
func (t *trial) isHeld(observer locker.Locker, key string) bool {
	lease, held := t.try(observer, key)
	if !held {
		t.release(observer, lease)
	}
	return held
}

// undisturbed fails the row if a lease that must be held is not, and releases it.
func (t *trial) undisturbed(l locker.Locker, lease locker.Lease) {
	t.mustBeHeld(l, lease.Key)
	if holding := t.inspect(l, lease.Key); holding.Token != 0 && holding.Token != lease.Token || holding.Remaining > lease.TTL {
		t.Errorf("%q was granted with token %d and a TTL of %v, but the server has %+v", lease.Key, lease.Token, lease.TTL, holding)
	}
	if _, err := l.Extend(t.ctx, lease); err != nil {
		t.Errorf("extending the lock of %q, which is held: %v", lease.Key, err)
	}
	t.release(l, lease)
}
