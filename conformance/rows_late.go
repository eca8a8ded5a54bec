package conformance

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

var lateRows = []row{
	{
		name: "late-extend",
		clause: "Extend MUST NOT touch a successor's lease, also when it reaches the server long after its own " +
			"lease has expired.",
		long: true,
		run:  lateExtend,
	},
	{
		name: "late-release",
		clause: "Release frees the lock if, and only if, this very grant still holds it, also when it reaches the " +
			"server long after its lease has expired.",
		run: lateRelease,
	},
	{
		name: "late-by-a-moment",
		clause: "Release and Extend look at the owner and act in one step at the server: they MUST NOT touch a " +
			"successor either when the lease ends while they are under way.",
		long: true,
		run:  lateByAMoment,
	},
	{
		name:   "late-acquire",
		clause: "A request that lands after its caller has given up leaves nothing behind.",
		run:    lateAcquire,
	},
	{
		name: "slow-grant",
		clause: "A grant whose answer comes when its TTL is over is an error, never an expired lease; the Client " +
			"frees the key.",
		long: true,
		run:  slowGrant,
	},
}

// late sends a request of A's that is held up on the way, lets A's lease expire, and returns the lease that B is
// granted meanwhile. After that land delivers the request and returns its answer.
func (t *trial) late(send func(ctx context.Context, a locker.Locker, lease locker.Lease) error) (b locker.Locker, lease locker.Lease, land func() error) {
	a, net := t.open()
	b, _ = t.open()
	key := t.key("")
	old := t.acquire(a, key, ttl(2*t.TTL)) // longer than B's, so that a mix-up shows
	net.Hold()
	before := asked(net)
	answer := make(chan error, 1)
	t.spawn(func() { answer <- send(t.ctx, a, old) })
	t.eventually(t.soon(), "the request is on its way", func() bool { return net.Stats().Requests > before.requests })
	t.pass(time.Until(old.Start.Add(old.TTL * 9 / 10)))
	next, _ := t.freeWithin(b, key, old.Start, t.TTL+t.freed())
	if next.Token <= old.Token {
		t.Errorf("token %d follows %d", next.Token, old.Token)
	}
	return b, next, func() error {
		t.land(net)
		net.Heal()
		return receive(t, answer, t.TTL+t.slack, "an answer to what came late")
	}
}

func lateExtend(t *trial) {
	var a locker.Locker
	var old locker.Lease
	b, lease, land := t.late(func(ctx context.Context, l locker.Locker, held locker.Lease) error {
		a, old = l, held
		_, err := l.Extend(ctx, held)
		return err
	})
	if err := land(); err == nil {
		t.Errorf("Extend answered nil when the lease was over and its key another's")
	} else if !errors.Is(err, locker.ErrLost) {
		t.Logf("Extend did not wait for its answer: %v", err) // unknown; so ask again
	}
	if _, err := a.Extend(t.ctx, old); !errors.Is(err, locker.ErrLost) {
		t.Errorf("a second Extend: %v, want ErrLost", err)
	}
	observer, _ := t.open()
	t.expires(observer, lease)
	if _, err := b.Extend(t.ctx, lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend of the successor's lease after its TTL: %v, want ErrLost", err)
	}
}

func lateRelease(t *trial) {
	b, lease, land := t.late(func(ctx context.Context, a locker.Locker, held locker.Lease) error {
		return a.Release(ctx, held)
	})
	observer, _ := t.open()
	if err := land(); err == nil {
		t.Errorf("Release answered nil when the lease was over and its key another's")
	}
	t.mustBeHeld(observer, lease.Key)
	t.release(b, lease)
}

// lateByAMoment lets requests arrive at about the end of their lease, when somebody waits for the key. A link that is slow
// widens the gap between a look and an act that are two requests.
func lateByAMoment(t *trial) {
	way := t.TTL / 50
	l, net := t.open()
	next, _ := t.open()
	observer, _ := t.open()
	brief := max(t.TTL/4, t.caps.MinTTL)
	calls := []func(locker.Lease) error{
		func(lease locker.Lease) error { return l.Release(t.ctx, lease) },
		func(lease locker.Lease) error { _, err := l.Extend(t.ctx, lease); return err },
	}
	net.Delay(way, way)
	t.parallel(48, func(i int) {
		old := t.acquire(l, t.key(strconv.Itoa(i)), ttl(brief), noExtend)
		waiting := t.request(old.Key, ttl(long))
		granted := make(chan locker.Lease, 1)
		t.spawn(func() {
			if lease, err := next.Acquire(t.ctx, waiting); err != nil {
				t.Errorf("waiting for a lease that ends: %v", err)
			} else {
				granted <- lease
			}
		})
		end := old.Start.Add(old.TTL + way) // for the server, which got the request one way later
		arrives := end.Add(rand.N(4*way+t.caps.Expiry) - 3*way)
		t.pass(time.Until(arrives.Add(-way)))
		err := calls[i%2](old) // it may be in time, or not
		if err == nil && i%2 == 1 {
			err = l.Release(t.ctx, old)
		}
		if err != nil && !errors.Is(err, locker.ErrLost) {
			t.Errorf("at the end of a lease: got %v, want nil or ErrLost", err)
		}
		lease := receive(t, granted, old.TTL+max(t.caps.Fallback+t.slack, t.freed()), "the grant of a waiter behind a lease that ends")
		if i%2 == 1 {
			t.pass(old.TTL + t.caps.Expiry) // an Extend that hit the successor would have shortened its lease to that
		}
		t.undisturbed(next, lease)
		t.mustBeFree(observer, lease.Key)
	})
}

func lateAcquire(t *trial) {
	observer, _ := t.open()
	t.parallel(2, func(i int) {
		if i == 0 {
			t.lateWithdrawn(observer)
		} else {
			t.lateOrphan(observer)
		}
	})
}

// lateWithdrawn is about a Client, whose withdrawal lands too.
func (t *trial) lateWithdrawn(observer locker.Locker) {
	client, spy, net := t.spied(locker.WithTTL(long)) // so that it does not end by itself
	key := t.key("withdrawn")
	net.Hold()
	if _, err := client.Acquire(t.ctx, key, locker.WithWait(t.slack)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Acquire without a link: %v, want DeadlineExceeded", err)
	}
	t.eventually(t.soon(), "the Client withdraws its request", func() bool { return spy.releases.Load() > 0 })
	t.land(net)
	net.Heal()
	lease, _ := t.freeWithin(observer, key, time.Now(), 2*t.soon()) // a new connection may have to be made before
	t.release(observer, lease)
	if n := spy.tries.Load(); n > 0 {
		t.Errorf("%d renewals of a lock that nobody has got", n)
	}
}

// lateOrphan is about a caller that is not there any more to withdraw.
func (t *trial) lateOrphan(observer locker.Locker) {
	a, net := t.open()
	key := t.key("orphan")
	net.Hold()
	ctx, cancel := context.WithTimeout(t.ctx, t.slack)
	defer cancel()
	if _, err := a.Acquire(ctx, t.request(key)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Acquire without a link: %v, want DeadlineExceeded", err)
	}
	t.land(net)
	lease, _ := t.freeWithin(observer, key, time.Now(), t.freed())
	t.release(observer, lease)
}

// land delivers what a link holds.
func (t *trial) land(net *Network) {
	ctx, cancel := context.WithTimeout(t.ctx, t.TTL+t.slack)
	defer cancel()
	if err := net.Land(ctx); err != nil {
		t.Fatalf("what was held up does not land: %v", err)
	}
}

func slowGrant(t *trial) {
	observer, _ := t.open()
	client, net := t.client()
	key := t.key("")
	net.Delay(0, t.TTL+t.caps.Granularity)
	began := time.Now()
	lock, err := client.Acquire(t.ctx, key)
	took := time.Since(began)
	if err == nil {
		t.Errorf("granted with a TTL of %v by an answer that took %v; Err says %v", t.TTL, took, lock.Err())
		return
	}
	if errors.Is(err, locker.ErrHeld) {
		t.Errorf("acquire of a free key: %v", err)
	}
	if way := t.TTL + t.caps.Granularity; took > 10*way+t.slack { // a connection that must be opened takes several ways
		t.Errorf("a hopeless acquire was given up after %v, on a link on which each answer takes %v", took, way)
	}
	lease, _ := t.freeWithin(observer, key, time.Now(), t.soon())
	t.release(observer, lease)
}
