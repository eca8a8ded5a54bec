package conformance

import (
	"time"

	"github.com/fec20105/locker"
)

var restartRows = []row{
	{
		name: "server-pause",
		clause: "The work is told before a server that stands still and goes on later can give the lock to " +
			"somebody else; a shorter pause costs nothing.",
		needs: needPause,
		alone: true,
		run:   serverPause,
	},
	{
		name: "restart",
		clause: "A server that is killed and comes back with its data is a short outage, or an eviction where " +
			"EarlyFree says restart; tokens go on growing where Fencing says crash.",
		needs: needCrash,
		alone: true,
		run:   restart,
	},
	{
		name: "restart-without-data",
		clause: "When a server comes back without its data its locks are lost by their deadline; tokens go on " +
			"growing where Fencing says crash.",
		needs: needWipe,
		alone: true,
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
	t.takeOver(observer, lock, time.Now().Add(t.freed()))
	if reason := t.endsBy(lock, time.Now().Add(t.slack)); reason != locker.ReasonExpired {
		t.Errorf("the holder was told %v, want %v", reason, locker.ReasonExpired)
	}
}

func restart(t *trial) {
	long := 3 * t.TTL // a server needs time to start
	client, spy, _ := t.spied(locker.WithTTL(long))
	lock := t.hold(client, t.key(""))
	began := time.Now()
	t.outside("Server.Crash", t.Server.Crash)
	down := time.Since(began)

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
