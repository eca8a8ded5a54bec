package conformance

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var expiryRows = []row{
	{
		name: "no-heartbeat",
		clause: "Without a heartbeat the work is told when its TTL, counted from the sending of the request, is " +
			"over; others get the key not before that, and soon after.",
		run: noHeartbeat,
	},
	{
		name:   "heartbeat-holds",
		clause: "Under a heartbeat a lock is held for many times its TTL, with the same token.",
		long:   true,
		run:    heartbeatHolds,
	},
	{
		name: "blip",
		clause: "An outage that is shorter than the trust left costs nothing: the lock stays held and exclusive, " +
			"and is renewed soon after.",
		run: blip,
	},
	{
		name: "no-resurrection",
		clause: "Extend MUST NOT take back a lease that the server has freed, even if nobody else took the key " +
			"meanwhile.",
		run: noResurrection,
	},
	{
		name: "conservative-deadline",
		clause: "Start is read before the sending, so that a lease is not trusted longer than the server keeps " +
			"it, however long the answer was on its way.",
		long: true,
		run:  conservativeDeadline,
	},
	{
		name:   "early-warning",
		clause: "WithWarning is called once per lapse, before the loss.",
		run:    earlyWarning,
	},
	{
		name: "max-hold",
		clause: "After WithMaxHold the lock is lost with that reason, is not renewed any more, and ends at the " +
			"server with its TTL.",
		run: maxHold,
	},
}

func noHeartbeat(t *trial) {
	client, net := t.client(locker.WithoutHeartbeat())
	observer, _ := t.open()
	key := t.key("")
	before := time.Now()
	err := client.Do(t.ctx, key, func(ctx context.Context, l *locker.Lock) error {
		sent, lock := time.Now(), watch(ctx, l) // sent at some moment between before and now
		net.Cut()                               // so that the server frees the lock, and not a clean-up
		next, granted := t.takeOver(observer, lock, sent.Add(t.freed()))
		if late := t.expired(lock, granted); late > t.slack {
			t.Errorf("told %v after the deadline, want %v at most", late, t.slack)
		}
		if early := kept(locker.Lease{Start: before, TTL: t.TTL}).Sub(granted); early > 0 {
			t.Errorf("granted to another %v before the TTL was over", early)
		}
		if early := before.Add(t.TTL - t.margin() - t.slack).Sub(lock.at); early > 0 {
			t.Errorf("told %v too early", early)
		}
		if late := lock.Deadline().Sub(sent.Add(t.TTL + t.caps.Granularity - t.margin())); late > 0 {
			t.Errorf("trusted %v too long", late)
		}
		t.release(observer, next)
		net.Heal()
		t.pass(time.Until(before.Add(3 * t.TTL)))
		return nil
	})
	if lost := t.loss(err); lost.Reason != locker.ReasonExpired || !errors.Is(err, locker.ErrLost) {
		t.Errorf("Do returned %v, want an ErrLost with the reason %v", err, locker.ReasonExpired)
	}
}

func heartbeatHolds(t *trial) {
	// A machine that stands still for nearly as long as the TTL warns, too.
	before := max(t.TTL/6-t.slack, t.TTL/50)
	client, spy, _ := t.spied(locker.WithWarning(before, func(*locker.Lock) {
		t.Errorf("WithWarning was called although nothing went wrong")
	}))
	observer, _ := t.open()
	lock := t.hold(client, t.key(""))
	t.staysHeld(lock, spy, observer)
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}

// staysHeld watches a lock for six TTLs.
func (t *trial) staysHeld(lock *watched, spy *spy, observer locker.Locker) {
	token, renewals := lock.Token(), spy.renewals.Load()
	for end := time.Now().Add(6 * t.TTL); time.Now().Before(end); t.pass(t.TTL / 10) {
		t.mustBeHeld(observer, lock.Key())
		if err := lock.Err(); err != nil {
			t.Fatalf("lost although nothing went wrong: %v", err)
		}
	}
	if lock.Token() != token {
		t.Errorf("the token was %d and is %d now", token, lock.Token())
	}
	if renewals = spy.renewals.Load() - renewals; renewals < 12 {
		t.Errorf("%d renewals in six TTLs, want 12 at least", renewals)
	}
}

func blip(t *trial) {
	t.parallel(2, func(i int) {
		withReset := i == 1
		if withReset && t.caps.EarlyFree&locker.EarlyFreeDisconnect != 0 {
			return // that would be an eviction
		}
		client, spy, net := t.spied()
		observer, _ := t.open()
		lock := t.hold(client, t.key(strconv.Itoa(i)))
		token := lock.Token()
		t.pass(t.TTL/3 + rand.N(t.TTL/3)) // until any phase of the heartbeat

		net.Cut()
		t.pass(t.TTL / 3) // a heartbeat every T/3 can stand twice as much
		t.mustBeHeld(observer, lock.Key())
		if withReset {
			net.Reset()
		}
		renewals := spy.renewals.Load()
		net.Heal()
		t.eventually(t.TTL/3+t.slack, "the lock is renewed after a blip", func() bool { return spy.renewals.Load() > renewals })
		t.pass(t.TTL / 2)
		t.mustBeHeld(observer, lock.Key())
		if lock.Token() != token {
			t.Errorf("the token was %d and is %d after a blip", token, lock.Token())
		}
		if err := lock.Release(t.ctx); err != nil {
			t.Errorf("release after a blip: %v", err)
		}
	})
}

func noResurrection(t *trial) {
	a, _ := t.open()
	observer, _ := t.open()
	leases := make([]locker.Lease, 40) // what happens now and then must show, too
	t.parallel(len(leases), func(i int) {
		if i%2 == 0 {
			leases[i] = t.acquire(a, t.key(strconv.Itoa(i)))
		} else {
			leases[i] = t.acquire(a, t.key(strconv.Itoa(i)), noExtend)
		}
	})
	t.pass(t.freed())
	t.parallel(len(leases), func(i int) {
		for range 2 {
			if _, err := a.Extend(t.ctx, leases[i]); !errors.Is(err, locker.ErrLost) {
				t.Errorf("Extend of a lease that has expired: got %v, want ErrLost", err)
			}
			t.mustBeFree(observer, leases[i].Key)
		}
	})
}

// conservativeDeadline checks deadlines behind a link that takes a tenth of the TTL each way, which is 200 ms of 2 s.
func conservativeDeadline(t *trial) {
	observer, _ := t.open()
	t.parallel(10, func(i int) {
		client, _, net := t.spied()
		net.Delay(t.TTL/10, t.TTL/10)
		lock := t.hold(client, t.key(strconv.Itoa(i)+"/once"), locker.WithoutHeartbeat())
		_, granted := t.takeOver(observer, lock, time.Now().Add(t.freed()))
		t.knew(lock, granted)

		lock = t.hold(client, t.key(strconv.Itoa(i)+"/renewed"))
		t.pass(t.TTL + rand.N(t.TTL/3))
		if err := lock.Err(); err != nil {
			t.Errorf("a round trip of a fifth of the TTL must renew a lock, which was lost: %v", err)
		}
		net.Cut()
		_, granted = t.takeOver(observer, lock, time.Now().Add(t.freed()))
		t.knew(lock, granted)
	})
}

func earlyWarning(t *trial) {
	var warnings atomic.Int64
	client, spy, net := t.spied(locker.WithWarning(t.TTL/2, func(l *locker.Lock) {
		warnings.Add(1)
		if err := l.Err(); err != nil {
			t.Errorf("warned after the loss: %v", err)
		}
	}))
	lock := t.hold(client, t.key(""))
	t.pass(t.TTL)
	if n := warnings.Load(); n != 0 {
		t.Errorf("%d warnings before the first lapse", n)
	}

	net.Cut()
	t.eventually(t.TTL/2+t.slack, "the work is warned of the first lapse", func() bool { return warnings.Load() > 0 })
	renewals := spy.renewals.Load()
	net.Heal()
	t.eventually(t.TTL/3+t.slack, "the lock is renewed after the first lapse", func() bool { return spy.renewals.Load() > renewals })

	net.Cut()
	t.endsBy(lock, time.Now().Add(t.TTL+t.caps.Granularity+t.slack))
	if n := warnings.Load(); n != 2 {
		t.Errorf("%d warnings in two lapses", n)
	}
}

func maxHold(t *trial) {
	client, spy, _ := t.spied()
	observer, _ := t.open()
	limit := t.TTL * 3 / 2

	before := time.Now()
	lock := t.hold(client, t.key(""), locker.WithMaxHold(limit))
	sent := time.Now()
	if reason := t.endsBy(lock, sent.Add(limit+t.slack)); reason != locker.ReasonMaxHold {
		t.Errorf("the holder was told %v, want %v", reason, locker.ReasonMaxHold)
	}
	if lock.at.Before(before.Add(limit - t.slack)) {
		t.Errorf("told %v after the acquire, want %v", lock.at.Sub(before), limit)
	}
	tries := spy.tries.Load()
	_, granted := t.takeOver(observer, lock, sent.Add(limit+t.freed()))
	t.knew(lock, granted)
	if tries != spy.tries.Load() {
		t.Errorf("renewed after its maximum hold")
	}

	// A work that has ended need not keep others waiting.
	lock = t.hold(client, t.key("released"), locker.WithMaxHold(t.TTL/4))
	t.endsBy(lock, time.Now().Add(t.TTL/4+t.slack))
	if err := lock.Release(t.ctx); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release after the maximum hold: %v, want ErrLost", err)
	}
	t.freeWithin(observer, lock.Key(), time.Now(), t.soon())
}
