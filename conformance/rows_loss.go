package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

var lossRows = []row{
	{
		name:   "lost-before-freed",
		clause: "When renewals fail, the work is told before anybody else can be granted the lock, in every run.",
		run:    lostBeforeFreed,
	},
	{
		name: "hang",
		clause: "A server that accepts everything and answers nothing is asked again, and the work is told before " +
			"anybody else can be granted the lock.",
		run: hang,
	},
	{
		name: "evicted",
		clause: "A holder whose lock was taken away is told at once on a live link, by the deadline otherwise; no " +
			"renewal brings the lock back.",
		needs: needExpire,
		run:   evicted,
	},
	{
		name:   "healthy-after-loss",
		clause: "A Client that has lost a lock and its link acquires and holds like before once the link is back.",
		long:   true,
		run:    healthyAfterLoss,
	},
	{
		name: "quiet-after-release",
		clause: "Once Release has returned, no request names that lock again; a Release that races with the " +
			"heartbeat is no loss and leaves nothing.",
		run: quietAfterRelease,
	},
	{
		name: "release-while-down",
		clause: "Release returns by its own time-out also without a link, with an error that is no loss; the lock " +
			"then ends with its TTL.",
		run: releaseWhileDown,
	},
	{
		name:   "locks-are-not-forgotten",
		clause: "Each of many locks of one Client is reported lost before another is granted it.",
		run:    locksAreNotForgotten,
	},
}

func lostBeforeFreed(t *trial) {
	observer, _ := t.open()
	late := make([]time.Duration, 10)
	t.parallel(len(late), func(i int) {
		client, _, net := t.spied()
		lose := func(key string) (lock *watched, granted time.Time) {
			lock = t.hold(client, t.key(key))
			t.pass(t.TTL/3 + rand.N(t.TTL/3)) // until any phase of the heartbeat
			net.Cut()
			_, granted = t.takeOver(observer, lock, time.Now().Add(t.freed()))
			return lock, granted
		}
		t.knew(lose(fmt.Sprintf("%d/asks", i)))
		net.Heal() // and now it must be as good as new
		late[i] = t.expired(lose(fmt.Sprintf("%d/waits to be told", i)))
	})
	t.inTime(late)
}

func hang(t *trial) {
	observer, _ := t.open()
	late := make([]time.Duration, 4)
	t.parallel(len(late), func(i int) {
		client, spy, net := t.spied()
		lock := t.hold(client, t.key(strconv.Itoa(i)))
		t.pass(t.TTL/3 + rand.N(t.TTL/3)) // until any phase of the heartbeat
		net.Hang()
		tries := spy.tries.Load()
		_, granted := t.takeOver(observer, lock, time.Now().Add(t.freed()))
		late[i] = t.expired(lock, granted)
		if tries = spy.tries.Load() - tries; tries < 2 {
			t.Errorf("%d tries to renew while the server hung, want 2 at least", tries)
		}
	})
	t.inTime(late)
}

func evicted(t *trial) {
	observer, _ := t.open()
	evictions := []struct {
		name      string
		cut       bool // the link is down
		staysFree bool // nobody takes the key before the holder is told
		reasons   []locker.Reason
	}{
		{name: "taken over", reasons: []locker.Reason{locker.ReasonTaken, locker.ReasonDisconnected}},
		{name: "left free", staysFree: true, reasons: []locker.Reason{locker.ReasonTaken, locker.ReasonDisconnected}},
		{name: "cut off", cut: true, reasons: []locker.Reason{locker.ReasonExpired}},
	}
	t.parallel(len(evictions), func(i int) {
		e := evictions[i]
		client, spy, net := t.spied()
		lock := t.hold(client, t.key(e.name))
		t.pass(t.TTL/3 + rand.N(t.TTL/3)) // until any phase of the heartbeat
		if e.cut {
			net.Cut()
		}
		t.expire(spy.lease(lock.Key()))

		told := time.Now().Add(t.soon())
		switch {
		case e.cut:
			told = lock.Deadline().Add(t.slack)
		case !t.caps.ReportsLoss:
			told = told.Add(t.TTL / 3) // at the next heartbeat
		}
		mustBeTold := func() {
			if reason := t.endsBy(lock, told); !slices.Contains(e.reasons, reason) {
				t.Errorf("%s: the holder was told %v, want one of %v", e.name, reason, e.reasons)
			}
		}
		if e.staysFree {
			mustBeTold()
		}
		next, _ := t.freeWithin(observer, lock.Key(), time.Now(), t.soon(), ttl(long)) // outlives the deadline
		if next.Token <= lock.Token() {
			t.Errorf("%s: token %d follows %d, which was evicted", e.name, next.Token, lock.Token())
		}
		mustBeTold()
		net.Heal()
		if err := lock.Extend(t.ctx); !errors.Is(err, locker.ErrLost) {
			t.Errorf("%s: Extend of a lock that was evicted: %v, want ErrLost", e.name, err)
		}
		t.release(observer, next)
		t.pass(t.TTL / 2) // longer than a heartbeat
		t.mustBeFree(observer, lock.Key())
	})
}

func healthyAfterLoss(t *trial) {
	client, spy, net := t.spied()
	observer, _ := t.open()
	key := t.key("")
	first := t.hold(client, key)
	net.Cut()
	t.endsBy(first, first.Deadline().Add(t.slack))
	net.Heal()

	ctx, cancel := context.WithTimeout(t.ctx, t.freed()+t.TTL)
	defer cancel()
	lock, err := client.Acquire(ctx, key)
	if err != nil {
		t.Fatalf("acquire after a loss: %v", err)
	}
	if lock.Token() <= first.Token() {
		t.Errorf("token %d follows %d, which was lost", lock.Token(), first.Token())
	}
	if err := first.Release(t.ctx); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release of a lost lock: %v, want ErrLost", err)
	}
	t.staysHeld(watch(lock.Context(), lock), spy, observer)
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release: %v", err)
	}
}

func quietAfterRelease(t *trial) {
	observer, _ := t.open()
	t.parallel(2, func(i int) {
		if i == 0 {
			t.quiet(observer)
		} else {
			t.releaseRacesHeartbeat(observer)
		}
	})
}

// quiet compares the link of a holder that has released with the link of another that did so long before.
func (t *trial) quiet(observer locker.Locker) {
	busy, spy, net := t.spied()
	idle, _, idleNet := t.spied()
	key := t.key("quiet")
	if err := t.hold(idle, t.key("idle")).Release(t.ctx); err != nil {
		t.Errorf("release: %v", err)
	}
	lock := t.hold(busy, key)
	t.eventually(t.TTL+t.slack, "the lock is renewed twice", func() bool { return spy.renewals.Load() >= 2 })
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release: %v", err)
	}

	tries, naming := spy.tries.Load(), net.Naming(key)
	before, idleBefore := net.Stats(), idleNet.Stats()
	t.pass(t.TTL) // three heartbeats
	after, idleAfter := net.Stats(), idleNet.Stats()
	if n := naming(); n > 0 {
		t.Errorf("%d requests named the key after its release", n)
	}
	if n := spy.tries.Load() - tries; n > 0 {
		t.Errorf("%d renewals after the release", n)
	}
	// One more than the other, for they are not in step.
	if n, most := after.Requests-before.Requests, idleAfter.Requests-idleBefore.Requests+1; n > most {
		t.Errorf("%d requests (%d bytes) after the release, want the %d of an idle Locker",
			n, after.BytesUp-before.BytesUp, most)
	}
	t.mustBeFree(observer, key)
}

// releaseRacesHeartbeat releases 500 times at about the moment of a heartbeat.
func (t *trial) releaseRacesHeartbeat(observer locker.Locker) {
	const every = 10 * time.Millisecond
	client, spy, _ := t.spied(locker.WithHeartbeat(every))
	keys := make([]string, 10)
	t.parallel(len(keys), func(i int) {
		keys[i] = t.key("race/" + strconv.Itoa(i))
		for range 50 {
			lock := t.hold(client, keys[i]) // and so the one before has left nothing
			t.pass(every - time.Millisecond + rand.N(2*time.Millisecond))
			if err := lock.Release(t.ctx); err != nil {
				t.Errorf("a release that races with the heartbeat: %v", err)
			}
			if err := lock.Err(); !errors.Is(err, locker.ErrReleased) {
				t.Errorf("Err after a release that races with the heartbeat: %v, want ErrReleased", err)
			}
		}
	})
	if spy.tries.Load() == 0 {
		t.Errorf("no release raced with a heartbeat")
	}
	t.pass(5 * every)
	for _, key := range keys {
		t.mustBeFree(observer, key)
	}
}

func releaseWhileDown(t *trial) {
	timeout := t.TTL / 4
	client, spy, net := t.spied(locker.WithReleaseTimeout(timeout))
	observer, _ := t.open()
	lock := t.hold(client, t.key(""))
	t.pass(t.TTL/3 + rand.N(t.TTL/3)) // until any phase of the heartbeat
	net.Cut()
	began := time.Now()
	err := lock.Release(t.ctx)
	if took := time.Since(began); took > timeout+t.slack {
		t.Errorf("Release without a link took %v, want %v at most", took, timeout)
	}
	if err == nil || errors.Is(err, locker.ErrLost) {
		t.Errorf("Release without a link: %v, want an error that is no loss", err)
	}
	if again := lock.Release(t.ctx); !errors.Is(again, err) {
		t.Errorf("the second Release: %v, want the answer of the first, %v", again, err)
	}
	tries := spy.tries.Load()
	t.freeWithin(observer, lock.Key(), began, t.freed())
	if n := spy.tries.Load() - tries; n > 0 {
		t.Errorf("%d renewals after the release", n)
	}
}

func locksAreNotForgotten(t *trial) {
	client, net := t.client()
	observer, _ := t.open()
	other, _ := t.open()
	locks := make([]*watched, 200)
	t.parallel(len(locks), func(i int) { locks[i] = t.hold(client, t.key(strconv.Itoa(i))) })
	t.pass(t.TTL/3 + rand.N(t.TTL/3))

	net.Cut()
	cut := time.Now()
	leases := make([]locker.Lease, len(locks))
	t.parallel(len(locks), func(i int) { // in the order of their deadlines, or nearly so
		lease, granted := t.takeOver(observer, locks[i], cut.Add(t.freed()), ttl(4*t.TTL))
		t.knew(locks[i], granted)
		// How late it may be is for other rows: here are many timers, and each must fire.
		t.endsBy(locks[i], granted.Add(t.TTL))
		leases[i] = lease
	})

	t.pass(time.Until(cut.Add(2 * t.TTL)))
	net.Heal()
	t.pass(t.TTL / 3) // what the Client had sent for its locks arrives
	t.parallel(len(locks), func(i int) {
		if err := locks[i].Err(); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Err of a lost lock after the cut: %v, want ErrLost", err)
		}
		t.mustBeHeld(other, locks[i].Key())
		t.release(observer, leases[i])
	})
}
