package conformance

import (
	"errors"
	"time"

	"github.com/fec20105/locker"
)

var restartRows = []row{
	{
		name: "server-pause",
		clause: "The work is told before a server that stands still and goes on later can give the lock to " +
			"somebody else; a shorter pause costs nothing.",
		needs: needPause,
		hurts: true,
		run:   serverPause,
	},
	{
		name: "restart",
		clause: "A server that is killed and comes back with its data is a short outage, or an eviction where " +
			"EarlyFree says restart; tokens go on growing where Fencing says crash.",
		needs: needCrash,
		hurts: true,
		run:   restart,
	},
	{
		name: "restart-without-data",
		clause: "When a server comes back without its data its locks are lost by their deadline; tokens go on " +
			"growing where Fencing says crash.",
		needs: needWipe,
		hurts: true,
		run:   restartWithoutData,
	},
}

func serverPause(t *trial) {
	pause := func(d time.Duration) {
		t.outside("Server.Pause", t.Server.Pause)
		t.pass(d)
		t.outside("Server.Resume", t.Server.Resume)
	}
	client, spy, _ := t.spied()
	observer, _ := t.open()
	lock := t.hold(client, t.key(""))
	renewals := spy.renewals.Load()
	pause(t.TTL / 3)
	t.eventually(t.TTL/3+t.soon(), "the lock is renewed after a short pause", func() bool { return spy.renewals.Load() > renewals })
	t.mustBeHeld(observer, lock.Key())

	pause(t.TTL + t.slack)
	_, granted := t.takeOver(observer, lock, time.Now().Add(t.freed()))
	if late := t.expired(lock, granted); late > t.slack {
		t.Errorf("told %v after the deadline, want %v at most", late, t.slack)
	}
}

func restart(t *trial) {
	long := 3 * t.TTL // a server needs time to start
	client, spy, _ := t.spied(locker.WithTTL(long))
	lock := t.hold(client, t.key(""))
	l, _ := t.open()
	lease := t.acquire(l, t.key("forgotten or not"), ttl(long))
	began := time.Now()
	t.outside("Server.Crash", t.Server.Crash)
	down := time.Since(began)
	t.notTakenBack(l, lease)

	renewals := spy.renewals.Load()
	t.eventually(long+t.slack, "the lock is renewed or lost after a restart", func() bool {
		return spy.renewals.Load() > renewals || lock.Err() != nil
	})
	if err := lock.Err(); err == nil {
		observer, _ := t.open()
		t.mustBeHeld(observer, lock.Key())
		if err := lock.Release(t.ctx); err != nil {
			t.Errorf("release after a restart: %v", err)
		}
	} else {
		t.endsBy(lock, lock.Deadline().Add(t.slack))
		if t.caps.EarlyFree&locker.EarlyFreeRestart == 0 && down < long/3 {
			t.Errorf("a restart that took %v cost a lock with a TTL of %v: %v", down.Round(time.Millisecond), long, err)
		}
	}
	t.grows(lock)
}

// notTakenBack looks whether a server that was restarted still knows a lease. If not, no Extend takes the lock back.
func (t *trial) notTakenBack(l locker.Locker, lease locker.Lease) {
	other, _ := t.open()
	next, err := locker.Lease{}, error(nil)
	_ = t.answered(func() error { next, err = other.Acquire(t.ctx, t.request(lease.Key, noWait)); return err })
	if err != nil {
		return // it does; or the server is not ready before the lease is over
	}
	if next.Token <= lease.Token && t.caps.Fencing >= locker.FencingCrash {
		t.Errorf("token %d follows %d, although tokens survive a %v", next.Token, lease.Token, t.caps.Fencing)
	}
	t.release(other, next)
	if err := t.answered(func() error { _, err := l.Extend(t.ctx, lease); return err }); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend of a lease that the server had forgotten, and granted to another: got %v, want ErrLost", err)
	}
	t.mustBeFree(other, lease.Key)
}

func restartWithoutData(t *trial) {
	client, _, _ := t.spied()
	lock := t.hold(client, t.key(""))
	t.outside("Server.Wipe", t.Server.Wipe)
	t.endsBy(lock, lock.Deadline().Add(t.slack))
	t.grows(lock)
}

// grows acquires the key of a lock that has ended, from a server that may have forgotten it. What a server demands
// after a restart before it grants anything may take its time; the watchdog bounds it.
func (t *trial) grows(lock *watched) {
	again, _ := t.client()
	next, err := again.Acquire(t.ctx, lock.Key())
	if err != nil {
		t.Fatalf("acquire after a restart: %v", err)
	}
	if t.caps.Fencing >= locker.FencingCrash && next.Token() <= lock.Token() {
		t.Errorf("token %d follows %d, although tokens survive a %v", next.Token(), lock.Token(), t.caps.Fencing)
	}
	if err := next.Release(t.ctx); err != nil {
		t.Errorf("release after a restart: %v", err)
	}
}
