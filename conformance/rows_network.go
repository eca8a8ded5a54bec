package conformance

import (
	"context"
	"errors"
	"time"

	"github.com/fec20105/locker"
)

// networkRows prove that this harness's traffic goes over the Network, and that the faults are real: otherwise every
// later row would pass without a fault.
var networkRows = []row{{
	name:   "faults-are-real-cut",
	clause: "No byte passes a link that is cut, and what was kept back arrives after Heal.",
	run:    func(t *trial) { deadLink(t, func(net *Network) { net.Cut() }) },
}, {
	name:   "faults-are-real-hang",
	clause: "A server that hangs answers nothing, and goes on after Heal.",
	run:    func(t *trial) { deadLink(t, (*Network).Hang) },
}, {
	name:   "faults-are-real-delay",
	clause: "A call over a delayed link takes at least one way there and one way back.",
	run: func(t *trial) {
		l, net := t.open()
		t.release(l, t.acquire(l, t.key("warm")))
		net.Delay(30*time.Millisecond, 40*time.Millisecond)
		began := time.Now()
		t.acquire(l, t.key("slow"))
		if took := time.Since(began); took < 70*time.Millisecond {
			t.Fatalf("an acquire took %v, want at least 70 ms: does the harness use the Network?", took)
		}
	},
}, {
	name:   "faults-are-real-late",
	clause: "A request that is held reaches the server when it lands, although its caller has given up.",
	run: func(t *trial) {
		l, net := t.open()
		observer, _ := t.open()
		key := t.key("")
		lease := t.acquire(l, key, ttl(10*t.TTL))
		net.Hold()
		t.unanswered("release", func(ctx context.Context) error { return l.Release(ctx, lease) })
		t.mustBeHeld(observer, key)
		ctx, cancel := context.WithTimeout(t.ctx, t.TTL)
		defer cancel()
		if err := net.Land(ctx); err != nil {
			t.Fatalf("the server did not answer what landed: %v", err)
		}
		t.eventually(t.slack, "the release has landed", func() bool {
			lease, held := t.try(observer, key)
			if !held {
				t.release(observer, lease)
			}
			return !held
		})
	},
}, {
	name:   "faults-are-real-swallow",
	clause: "The reply that is swallowed is one to a request on which the server has acted.",
	run: func(t *trial) {
		l, net := t.open()
		observer, _ := t.open()
		key := t.key("")
		lease := t.acquire(l, key, ttl(10*t.TTL))
		swallowed := net.SwallowReply()
		err := l.Release(t.ctx, lease)
		if !t.wait(swallowed, t.TTL) {
			t.Fatalf("no reply was swallowed, and the release got %v: does the harness use the Network?", err)
		}
		lease, _ = t.freeWithin(observer, key, time.Now(), t.slack) // if there are several servers, the others may be slower
		t.release(observer, lease)
	},
}, {
	name:   "faults-are-real-reset",
	clause: "A reset ends the connections, and new ones work.",
	run: func(t *trial) {
		l, net := t.open()
		observer, _ := t.open()
		key := t.key("held")
		lease := t.acquire(observer, key, ttl(10*t.TTL))
		before := asked(net)
		ended := make(chan error, 1)
		t.spawn(func() { _, err := l.Acquire(t.ctx, t.request(key)); ended <- err })
		t.waiting(observer, key, 1, before)
		dials := net.Stats().Dials
		net.Reset()
		t.eventually(t.TTL, "an acquire works again", func() bool {
			lease, err := l.Acquire(t.ctx, t.request(t.key("again"), noWait))
			if err == nil {
				t.release(l, lease)
			}
			return err == nil
		})
		// What has no connections to make again cannot go on with what it was doing.
		if net.Stats().Dials == dials {
			_ = receive(t, ended, t.soon(), "a wait ends when its link is reset: does the harness use the Network?")
		}
		t.release(observer, lease)
	},
}}

// deadLink checks that a request does not pass the fault.
func deadLink(t *trial, fault func(*Network)) {
	l, net := t.open()
	observer, _ := t.open()
	key := t.key("")
	lease := t.acquire(l, key, ttl(10*t.TTL))
	before := t.atRest(net)
	if before.Requests == 0 || before.BytesUp == 0 || before.BytesDown == 0 {
		t.Fatalf("an acquire has left no trace on the link (%+v): the harness does not use the Network", before)
	}
	fault(net)
	t.unanswered("release", func(ctx context.Context) error { return l.Release(ctx, lease) })
	if after := net.Stats(); after.BytesDown != before.BytesDown {
		t.Errorf("%d bytes have come from the server over a dead link", after.BytesDown-before.BytesDown)
	}
	t.mustBeHeld(observer, key)
	net.Heal()
	t.eventually(t.TTL, "a release works after Heal", func() bool {
		err := l.Release(t.ctx, lease)
		return err == nil || errors.Is(err, locker.ErrLost)
	})
	t.mustBeFree(observer, key)
}

// atRest waits until nothing is on its way: a call that asks several servers returns when enough of them have answered.
func (t *trial) atRest(net *Network) Stats {
	before := net.Stats()
	t.eventually(t.TTL, "nothing is on its way while no call is made", func() bool {
		t.pass(20 * time.Millisecond)
		last := before
		before = net.Stats()
		return before == last
	})
	return before
}

// unanswered makes a call over a dead link: it must end soon after its ctx, with the ctx's error.
func (t *trial) unanswered(what string, call func(context.Context) error) {
	ctx, cancel := context.WithTimeout(t.ctx, 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	err := call(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%s over a dead link got %v, want DeadlineExceeded", what, err)
	}
	t.wrapped(err)
	if took := time.Since(began); took > 100*time.Millisecond+t.slack {
		t.Errorf("%s over a dead link returned %v after its ctx, more than %v", what, took-100*time.Millisecond, t.slack)
	}
}
