package conformance

import (
	"context"
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

var deadWaiterRows = []row{
	{
		name: "waiter-loses-session",
		clause: "A waiter whose place at the server is gone MUST return an error or queue again; it MUST NOT be " +
			"granted the lock by the dead place.",
		needs: needEndWait,
		run:   waiterLosesSession,
	},
	{
		name:   "dead-waiter",
		clause: "A waiter that has vanished delays those behind it by Fallback or one TTL at most.",
		run:    deadWaiter,
	},
	{
		name: "dead-waiters",
		clause: "Several waiters that have vanished delay those behind them by Fallback each at most, and by one " +
			"Fallback if they vanished together.",
		run: deadWaiters,
	},
}

// inLine is a request that waits at the server, on a link of its own.
type inLine struct {
	locker.Locker
	net     *Network
	req     locker.Request
	granted chan locker.Lease // has room for the one answer
	failed  chan error        // the same
}

// lineUp makes a Locker wait for key, as the n-th at the server.
func (t *trial) lineUp(n int, observer locker.Locker, key string) *inLine {
	l, net := t.open()
	w := &inLine{Locker: l, net: net, req: t.request(key), granted: make(chan locker.Lease, 1), failed: make(chan error, 1)}
	before := asked(net)
	t.spawn(func() {
		if lease, err := l.Acquire(t.ctx, w.req); err != nil {
			w.failed <- err
		} else {
			w.granted <- lease
		}
	})
	t.waiting(observer, key, n, before)
	return w
}

func waiterLosesSession(t *trial) {
	a, _ := t.open()
	observer, _ := t.open()
	key := t.key("")
	held := t.acquire(a, key, ttl(10*t.TTL))
	b := t.lineUp(1, observer, key)
	t.outside("EndWait", func(ctx context.Context) error { return t.EndWait(ctx, b.req) })
	t.release(a, held)

	timer := time.NewTimer(t.freed())
	defer timer.Stop()
	select {
	case err := <-b.failed:
		t.Logf("a waiter without a session was told: %v", err)
	case lease := <-b.granted:
		// It must have queued again then, and hold the lock like anybody else.
		t.mustBeHeld(observer, key)
		t.mustBeHeld(a, key)
		t.release(b, lease)
	case <-timer.C:
		t.Fatalf("a waiter without a session waits still, %v after the release", t.freed())
	}
}

func deadWaiter(t *trial) {
	a, _ := t.open()
	observer, _ := t.open()
	key := t.key("")
	held := t.acquire(a, key, ttl(10*t.TTL))
	dead := t.lineUp(1, observer, key)
	alive := t.lineUp(2, observer, key)
	dead.net.Cut()
	t.release(a, held)
	receive(t, alive.granted, max(t.caps.Fallback+t.slack, t.freed()), "the grant of a waiter behind a dead one")
}

func deadWaiters(t *trial) {
	const many = 5
	delay := t.caps.Fallback
	together := delay
	if delay == 0 { // no promise but the TTL
		delay = t.freed()
		together = many * delay
	}
	t.parallel(2, func(i int) {
		a, _ := t.open()
		observer, _ := t.open()
		key := t.key(strconv.Itoa(i))
		held := t.acquire(a, key, ttl(20*t.TTL))
		dead := make([]*inLine, many)
		for n := range dead {
			dead[n] = t.lineUp(n+1, observer, key)
		}
		alive := t.lineUp(many+1, observer, key)
		within := together
		if i > 0 {
			within = many * delay
		}
		for _, w := range dead {
			w.net.Cut()
			if i > 0 {
				t.pass(delay / many / 2)
			}
		}
		t.release(a, held)
		receive(t, alive.granted, within+t.slack, "the grant of a waiter behind five dead ones")
	})
}
