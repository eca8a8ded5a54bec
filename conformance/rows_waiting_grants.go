package conformance

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

// waitedRows check the grants for which somebody had to wait, and requests that are withdrawn while they wait.
var waitedRows = []row{
	{
		name: "waited-grant",
		clause: "A grant that was waited for is like any other: Start is before the sending of what set its timer, not the " +
			"moment of the answer, and the server keeps it for its TTL, not for what the wait has left of it.",
		run: waitedGrant,
	},
	{
		name:   "withdrawn-while-waiting",
		clause: "Release(Lease{Key, ID}) withdraws a request that waits: it MUST NOT be granted, nor stay in the queue.",
		run:    withdrawnWhileWaiting,
	},
	{
		name: "wakeups-return",
		clause: "Where Capabilities.Notifies, a release wakes the next waiter at once also after that waiter's link was cut " +
			"and reset.",
		run: wakeUpsReturn,
	},
}

func waitedGrant(t *trial) {
	observer, _ := t.open()
	t.parallel(8, func(i int) {
		holder, _ := t.open()
		waiter, net := t.open()
		key := t.key(strconv.Itoa(i))
		held := t.acquire(holder, key, ttl(long))
		granted := t.queueUp(waiter, net, observer, key, 1)
		if i%2 == 0 {
			net.Delay(t.TTL/10, t.TTL/10) // the news of the grant takes its time
		}
		t.pass(t.TTL * time.Duration(1+i%4) / 4) // much of a timer that began with the wait would be over
		t.release(holder, held)
		g := receive(t, granted, max(t.caps.Fallback+t.slack, t.freed())+t.TTL/2, "a waiter gets the key that was released")
		t.expiresBy(observer, g.lease, g.at.Add(t.freed()))
	})
}

func withdrawnWhileWaiting(t *trial) {
	holder, _ := t.open()
	observer, _ := t.open()
	l, net := t.open()
	t.parallel(4, func(i int) {
		held := t.acquire(holder, t.key(strconv.Itoa(i)), ttl(long))
		req := t.request(held.Key, ttl(long))
		ctx, cancel := t.timeout(2 * (t.TTL + t.slack)) // nothing says that the wait must end before its ctx does
		defer cancel()
		answer := make(chan error, 1)
		before := asked(net)
		t.spawn(func() { _, err := l.Acquire(ctx, req); answer <- err })
		t.waiting(observer, held.Key, 1, before)
		if err := l.Release(t.ctx, locker.Lease{Key: req.Key, ID: req.ID}); err != nil {
			t.Errorf("withdrawing a request that waits: %v", err)
		}
		t.waiting(observer, held.Key, 0)
		t.release(holder, held)
		t.withdrawn(observer, held.Key)
		if err := receive(t, answer, 3*(t.TTL+t.slack), "a wait that was withdrawn ends with its ctx"); err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("a request that was withdrawn while it waited got %v, want an error that is no loss", err)
		}
		t.withdrawn(observer, held.Key)
	})
}

// wakeUpsReturn breaks the link of a waiter while a wake-up is on its way, and gives it time to listen again.
func wakeUpsReturn(t *trial) {
	if !t.caps.Notifies {
		t.Skipf("the backend says that it does not notify")
	}
	holder, _ := t.open()
	observer, _ := t.open()
	waiter, net := t.open()
	lease := t.acquire(holder, t.key("before"), ttl(long))
	ctx, giveUp := context.WithCancel(t.ctx)
	defer giveUp()
	before, ended := asked(net), make(chan struct{})
	t.spawn(func() {
		defer close(ended)
		_, _ = waiter.Acquire(ctx, t.request(lease.Key)) // the reset may end it
	})
	t.waiting(observer, lease.Key, 1, before)
	net.Cut()
	t.release(holder, lease)
	t.pass(t.slack / 10)
	net.Reset()
	net.Heal()
	giveUp()
	_ = receive(t, ended, t.TTL+t.slack, "a wait ends with its ctx")

	const inARow = 3
	atOnce := 3*t.rtt + t.slack
	patience := 5*max(t.TTL, t.caps.Fallback) + t.slack
	took := func() time.Duration {
		lease := t.acquire(holder, t.key("after"), ttl(long))
		before, granted := asked(net), make(chan grant, 1)
		t.spawn(func() {
			for t.ctx.Err() == nil { // each connection of a pool may fail once after a reset
				req := t.request(lease.Key)
				lease, err := waiter.Acquire(t.ctx, req)
				if err == nil {
					granted <- grant{lease, time.Now()}
					return
				}
				_ = waiter.Release(t.ctx, locker.Lease{Key: req.Key, ID: req.ID})
			}
		})
		t.waiting(observer, lease.Key, 1, before)
		released := time.Now()
		t.release(holder, lease)
		g := receive(t, granted, max(t.caps.Fallback+t.slack, t.freed()), "a waiter gets the key that was released")
		t.release(waiter, g.lease)
		return g.at.Sub(released)
	}
	for begun, good := time.Now(), 0; good < inARow; {
		last := took()
		if good++; last > atOnce {
			good = 0
		}
		if good == 0 && time.Since(begun) > patience {
			t.Fatalf("%v after its link was healed a waiter gets the key that was released after %v, and not at once", patience, last)
		}
	}
}
