package conformance

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

// hygieneRows has what the end of each row does not check anyway: that no connection and no goroutine is left.
var hygieneRows = []row{
	{
		name: "dropped-locker",
		clause: "What a Locker still holds when it is closed is left to expire. Where EarlyFree has disconnect it is " +
			"freed at once, and its holder is told ReasonClosed.",
		run: droppedLocker,
	},
	{
		name:   "nothing-piles-up",
		clause: "A call that has ended leaves no goroutine and no connection behind that live until Close.",
		run:    nothingPilesUp,
	},
}

// nothingPilesUp makes many calls on one Locker, one after the other, that end in every way. What it keeps for the next
// is allowed, but not more of it with each.
func nothingPilesUp(t *trial) {
	const many, few = 200, 50
	l, net := t.open()
	holder, _ := t.open()
	held := t.acquire(holder, t.key("held"), ttl(long))
	free := t.key("free")
	calls := func() {
		ctx, cancel := t.timeout(t.slack / 20)
		defer cancel()
		req := t.request(held.Key, ttl(long))
		if _, err := l.Acquire(ctx, req); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("waiting for a key that is held: got %v, want DeadlineExceeded", err)
		}
		if err := l.Release(t.ctx, locker.Lease{Key: req.Key, ID: req.ID}); err != nil {
			t.Errorf("withdrawing the request: %v", err)
		}
		if _, err := l.Acquire(t.ctx, t.request(held.Key, noWait)); !errors.Is(err, locker.ErrHeld) {
			t.Errorf("a key that is held: got %v, want ErrHeld", err)
		}
		t.release(l, t.acquire(l, free, ttl(long)))
	}
	calls()
	goroutines, open := goroutineCount(t.id), net.Stats().Open
	for range many {
		calls()
	}
	if !poll(20*t.slack, func() bool { return goroutineCount(t.id) < goroutines+few && net.Stats().Open < open+few }) {
		t.Errorf("after %d calls there are %d goroutines and %d connections, where there were %d and %d:\n%s",
			4*many, goroutineCount(t.id), net.Stats().Open, goroutines, open, goroutinesOf(t.id))
	}
	t.release(holder, held)
}

func droppedLocker(t *trial) {
	const keys = 10
	observer, _ := t.open()
	leases := make([]locker.Lease, keys)
	told := make(chan locker.Reason, 2*keys)
	l, _ := t.open()
	t.parallel(keys, func(i int) {
		leases[i] = t.acquire(l, t.key(strconv.Itoa(i)), func(req *locker.Request) {
			req.Lost = func(r locker.Reason) { told <- r }
		})
	})
	if err := l.Close(); err != nil {
		t.Errorf("closing a Locker that holds locks: %v", err)
	}
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 {
		t.parallel(keys, func(i int) { t.expires(observer, leases[i]) })
		return
	}
	closed := time.Now()
	t.parallel(keys, func(i int) {
		lease, _ := t.freeWithin(observer, leases[i].Key, closed, t.soon())
		t.release(observer, lease)
	})
	for range keys {
		if reason := receive(t, told, t.soon(), "Close tells the holder of a lock that it frees"); reason != locker.ReasonClosed {
			t.Errorf("a holder was told %v by Close, want %v", reason, locker.ReasonClosed)
		}
	}
}
