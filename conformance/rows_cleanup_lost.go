package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// attempts is how often a row swallows a reply: it may catch one to a request that the Locker has made of its own
// accord.
const attempts = 5

func heldIsKnown(t *trial) {
	l, net := t.open()
	observer, _ := t.open()
	t.release(l, t.acquire(l, t.key("warm")))
	key := t.key("")
	net.Hang()
	var asked []locker.Request
	for range 3 {
		req := t.request(key, noWait)
		asked = append(asked, req)
		ctx, cancel := t.timeout(t.TTL / 8)
		_, err := l.Acquire(ctx, req)
		cancel()
		if err == nil || errors.Is(err, locker.ErrHeld) {
			t.Errorf("an acquire of a key that nobody holds got %v over a link on which nothing is answered", err)
		}
	}
	net.Heal()
	for _, req := range asked {
		if err := t.answered(func() error { return l.Release(t.ctx, locker.Lease{Key: key, ID: req.ID}) }); err != nil {
			t.Errorf("withdrawing a request: %v", err)
		}
	}
	t.release(observer, t.acquire(observer, key))
}

func ambiguousAcquire(t *trial) {
	observer, _ := t.open()
	hits, gone := 0, 0
	count := func(swallowed <-chan struct{}) {
		select {
		case <-swallowed:
			gone++
		default:
		}
	}

	// On the Locker the request may be made again, which is not granted twice, and is then withdrawn.
	l, net := t.open()
	for i := range attempts {
		req := t.request(t.key(fmt.Sprint("locker ", i)), noWait, ttl(long))
		swallowed := net.SwallowReply()
		_, err := l.Acquire(t.ctx, req)
		count(swallowed)
		net.Heal()
		held := t.isHeld(observer, req.Key)
		switch {
		case errors.Is(err, locker.ErrHeld):
			t.Errorf("nobody but this request asks for %q, whose answer was swallowed; it got %v", req.Key, err)
		case err != nil && held:
			hits++
		case err == nil && !held:
			t.Errorf("Acquire got nil, but nobody holds the key")
		}
		if again, err := l.Acquire(t.ctx, req); err == nil {
			t.mustBeHeld(observer, req.Key)
			if holding := t.inspect(observer, req.Key); holding.Token != 0 && holding.Token != again.Token {
				t.Errorf("made again, the request got token %d, but the server knows %d", again.Token, holding.Token)
			}
		}
		if err := t.answered(func() error { return l.Release(t.ctx, locker.Lease{Key: req.Key, ID: req.ID}) }); err != nil {
			t.Errorf("withdrawing the request: %v", err)
		}
		t.mustBeFree(observer, req.Key)
	}

	client, net := t.client(locker.WithTTL(long))
	for i := range attempts {
		key := t.key(fmt.Sprint("client ", i))
		swallowed := net.SwallowReply()
		ctx, cancel := t.timeout(t.TTL + t.slack)
		defer cancel()
		lock, err := client.Acquire(ctx, key)
		count(swallowed)
		if err == nil {
			err = lock.Release(t.ctx)
		} else {
			hits++
		}
		if errors.Is(err, locker.ErrHeld) || errors.Is(err, locker.ErrLost) {
			t.Errorf("nobody but this Client asks for %q, whose answer was swallowed; it got %v", key, err)
		}
		net.Heal()
		t.withdrawn(observer, key)
	}
	if gone == 0 {
		t.Errorf("no reply was swallowed: does the harness use the Network?")
	}
	t.Logf("%d of %d replies that were swallowed hit an Acquire", hits, gone)
}

func ambiguousRelease(t *trial) {
	observer, _ := t.open()
	hits := 0

	l, net := t.open()
	for i := range attempts {
		lease := t.acquire(l, t.key(fmt.Sprint("locker ", i)), ttl(long))
		net.SwallowReply()
		err := l.Release(t.ctx, lease)
		net.Heal()
		if err != nil {
			hits++
		}
		if again := t.answered(func() error { return l.Release(t.ctx, lease) }); errors.Is(err, locker.ErrLost) || again != nil {
			t.Errorf("a lost answer is not a lost lock, but Release got %v and when repeated %v", err, again)
		}
		t.mustBeFree(observer, lease.Key)
	}

	client, net := t.client(locker.WithTTL(long))
	for i := range attempts {
		key := t.key(fmt.Sprint("client ", i))
		compensated := false
		err := client.Do(t.ctx, key, func(context.Context, *locker.Lock) error {
			net.SwallowReply()
			return nil
		}, locker.WithCompensation(func(context.Context, *locker.LostError) error {
			compensated = true
			return nil
		}))
		net.Heal()
		if err != nil || compensated {
			t.Errorf("good work whose release was not answered: Do got %v; compensation ran: %t", err, compensated)
		}
		t.withdrawn(observer, key)
	}
	t.Logf("%d of %d replies that were swallowed hit a Release", hits, attempts)
}

func acquireIsIdempotent(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	asks := map[string]func(*locker.Request){"asks once": noWait, "waits": func(*locker.Request) {}}
	names := slices.Collect(maps.Keys(asks))
	t.parallel(len(names), func(i int) {
		name, ask := names[i], asks[names[i]]

		released := t.request(t.key(name+", released"), ask, ttl(long))
		lease := t.acquireTwice(l, released)
		t.mustBeHeld(observer, released.Key)
		t.release(l, lease) // once
		t.staysOver(l, observer, released)

		withdrawn := t.request(t.key(name+", withdrawn"), ask, ttl(long))
		if err := l.Release(t.ctx, locker.Lease{Key: withdrawn.Key, ID: withdrawn.ID}); err != nil {
			t.Errorf("withdrawing a request that was never made: %v", err)
		}
		t.staysOver(l, observer, withdrawn)

		abandoned := t.request(t.key(name+", abandoned"), ask)
		lease = t.acquireTwice(l, abandoned)
		next, granted := t.freeWithin(observer, abandoned.Key, time.Now(), t.freed())
		if early := kept(lease).Sub(granted); early > 0 {
			t.Errorf("the second answer to a request is trusted %v longer than the server keeps the lock", early)
		}
		t.release(observer, next)
	})
}

// acquireTwice makes a request, which must be granted, and makes it again a little later. It returns the second answer.
func (t *trial) acquireTwice(l locker.Locker, req locker.Request) locker.Lease {
	first, err := l.Acquire(t.ctx, req)
	if err != nil {
		t.Fatalf("acquire %q, which is free: %v", req.Key, err)
	}
	t.pass(t.TTL / 4)
	ctx, cancel := t.timeout(t.TTL/4 + t.slack)
	defer cancel()
	second, err := l.Acquire(ctx, req)
	if err != nil {
		t.Fatalf("the request that holds %q was made again: got %v, want the same grant", req.Key, err)
	}
	if second.Key != first.Key || second.ID != first.ID || second.Token != first.Token || second.TTL != first.TTL {
		t.Errorf("the request that was granted as %+v was made again, and was granted as %+v", first, second)
	}
	return second
}

// staysOver fails the row if a request that was released or withdrawn is granted or queued when it is made again.
func (t *trial) staysOver(l, observer locker.Locker, req locker.Request) {
	again := func(key string) {
		ctx, cancel := t.timeout(t.TTL/4 + t.slack)
		defer cancel()
		if lease, err := l.Acquire(ctx, req); err == nil {
			t.Errorf("a request that is over was made again for a key that is %s, and was granted token %d", key, lease.Token)
		} else if ctx.Err() != nil {
			t.Errorf("a request that is over was made again for a key that is %s, and waited until its ctx ended: %v", key, err)
		}
	}
	again("free")
	t.mustBeFree(observer, req.Key)
	successor := t.acquire(observer, req.Key, ttl(long))
	again("held")
	t.undisturbed(observer, successor)
	t.withdrawn(observer, req.Key)
}

func extendIsIdempotent(t *trial) {
	l, net := t.open()
	other, _ := t.open()
	lease := t.acquire(l, t.key(""), ttl(long))
	extend := func() locker.Lease {
		var fresh locker.Lease
		if err := t.answered(func() (err error) { fresh, err = l.Extend(t.ctx, lease); return err }); err != nil {
			t.Errorf("extending a lock that is held: %v", err)
		} else if fresh.Key != lease.Key || fresh.ID != lease.ID || fresh.Token != lease.Token || fresh.TTL < lease.TTL {
			t.Errorf("Extend made %+v of %+v", fresh, lease)
		}
		return fresh
	}
	if first, second := extend(), extend(); second.Start.Before(first.Start) {
		t.Errorf("the second Extend counts from %v before the first", first.Start.Sub(second.Start))
	}
	t.parallel(8, func(int) { extend() })
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 {
		net.SwallowReply()
		if _, err := l.Extend(t.ctx, lease); errors.Is(err, locker.ErrLost) {
			t.Errorf("an Extend whose reply was swallowed got %v, want an unknown outcome", err)
		}
		net.Heal()
		extend()
	}
	t.release(l, lease)

	lost := func() {
		for range 2 {
			if _, err := l.Extend(t.ctx, lease); !errors.Is(err, locker.ErrLost) {
				t.Errorf("extending a lock that was released got %v, want ErrLost", err)
			}
		}
	}
	lost()
	t.mustBeFree(other, lease.Key)
	successor := t.acquire(other, lease.Key, ttl(long))
	lost()
	t.undisturbed(other, successor)
}

func releaseIsIdempotent(t *trial) {
	l, _ := t.open()
	other, _ := t.open()
	lease := t.acquire(l, t.key("release"), ttl(long))
	repeat := func(lease locker.Lease) {
		for range 2 {
			if err := l.Release(t.ctx, lease); err != nil {
				t.Errorf("a repeated Release got %v, want nil like the first", err)
			}
		}
	}
	var both sync.WaitGroup // as client libraries repeat: when the first is on its way still
	for range 2 {
		both.Go(func() { repeat(lease) })
	}
	both.Wait()
	t.mustBeFree(other, lease.Key)
	successor := t.acquire(other, lease.Key, ttl(long))
	repeat(lease)
	repeat(locker.Lease{Key: lease.Key, ID: lease.ID})
	t.undisturbed(other, successor)

	// The clean-up of a request that was never made, and of one that was refused.
	req := t.request(t.key("clean-up"), noWait)
	repeat(locker.Lease{Key: req.Key, ID: req.ID})
	successor = t.acquire(other, req.Key, ttl(long))
	refused := t.request(req.Key, noWait)
	if _, err := l.Acquire(t.ctx, refused); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a key that is held: got %v, want ErrHeld", err)
	}
	repeat(locker.Lease{Key: refused.Key, ID: refused.ID})
	repeat(locker.Lease{Key: req.Key, ID: req.ID})
	t.undisturbed(other, successor)
}

func releaseLostInBlip(t *trial) {
	resets := []bool{false, true} // the request arrives late, or never
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect != 0 {
		resets = resets[:1]
	}
	t.parallel(len(resets), func(i int) {
		client, net := t.client(locker.WithReleaseTimeout(t.TTL / 6))
		observer, _ := t.open()
		var locks [2]*locker.Lock
		for j, name := range []string{"released", "neighbour"} {
			lock, err := client.Acquire(t.ctx, t.key(fmt.Sprintf("%s, reset %t", name, resets[i])))
			if err != nil {
				t.Fatalf("acquire: %v", err)
			}
			locks[j] = lock
		}
		released, neighbour := locks[0], locks[1]

		began := time.Now()
		net.Cut()
		err := released.Release(t.ctx)
		if took := time.Since(began); took > t.TTL/6+t.soon() {
			t.Errorf("Release on a link that is cut took %v, and its timeout is %v", took, t.TTL/6)
		}
		if err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("Release on a link that is cut got %v, want an unknown outcome", err)
		}
		t.pass(time.Until(began.Add(t.TTL / 3)))
		if resets[i] {
			net.Reset()
		}
		net.Heal()

		next, _ := t.freeWithin(observer, released.Key(), began, t.freed())
		t.release(observer, next)
		t.mustBeHeld(observer, neighbour.Key())
		if err := neighbour.Release(t.ctx); err != nil {
			t.Errorf("the neighbour, which was renewed all the time: %v", err)
		}
	})
}
