package conformance

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/clock"
)

var clockRows = []row{
	{
		name: "process-pause",
		clause: "In a process that was stopped for longer than the TTL the very first Err tells the loss, before " +
			"anything can be written.",
		needs: needProcess,
		run:   processPause,
	},
	{
		name: "suspend",
		clause: "Elapsed time is the larger of the monotonic clock and the boot clock, so that a suspended " +
			"machine wakes up without trust; the wall clock does not matter.",
		run: suspend,
	},
}

func processPause(t *trial) {
	observer, _ := t.open()
	other, _ := t.open()
	key := t.key("")
	holder := t.child()
	held := holder.acquire(key, t.TTL)

	holder.stop()
	stopped := time.Now()
	holder.send(command{Do: "err", Key: key}) // the first that it reads when it goes on
	for time.Since(stopped) < t.TTL/2-t.slack {
		t.mustBeHeld(observer, key)
		t.pass(t.TTL / 20)
	}
	next, granted := t.freeWithin(observer, key, stopped, t.freed())
	if granted.Before(held.Deadline) {
		t.Errorf("granted to another %v before the deadline of the holder", held.Deadline.Sub(granted))
	}
	t.release(observer, next)
	next = t.acquire(observer, key, ttl(4*t.TTL+4*time.Second))
	if next.Token <= held.Token {
		t.Errorf("token %d follows %d", next.Token, held.Token)
	}

	t.pass(time.Until(stopped.Add(t.TTL + time.Second)))
	holder.resume()
	if first := holder.answer(); !first.Lost {
		t.Errorf("the first Err after a pause of %v says %q, want a loss", time.Since(stopped), first.Error)
	}
	if release := holder.do(command{Do: "release", Key: key}); !release.Lost {
		t.Errorf("Release after a pause of %v says %q, want a loss", time.Since(stopped), release.Error)
	}
	t.mustBeHeld(other, key)
	t.release(observer, next)
}

// sleeper is a Locker on a machine that can be suspended: then its boot clock goes on and its monotonic one does not.
type sleeper struct {
	locker.Locker
	system clock.Clock
	slept  atomic.Int64
}

// Clock is looked for by a Client.
func (s *sleeper) Clock() clock.Clock { return s }

// Unwrap is the Locker without the machine.
func (s *sleeper) Unwrap() locker.Locker { return s.Locker }

// Now is a look at both clocks.
func (s *sleeper) Now() clock.Reading {
	r := s.system.Now()
	r.Boot += time.Duration(s.slept.Load())
	return r
}

func (s *sleeper) suspend(d time.Duration) { s.slept.Add(int64(d)) }

func suspend(t *trial) {
	l, _ := t.open()
	machine := &sleeper{Locker: l, system: clock.System()}
	client := t.clientOf(machine)

	lock := t.hold(client, t.key("short"), locker.WithoutHeartbeat())
	machine.suspend(t.TTL / 4)
	if err := lock.Err(); err != nil {
		t.Errorf("after a suspend of a quarter of the TTL: %v", err)
	}

	for _, long := range []struct {
		name string
		look func(*locker.Lock) error
	}{
		{"Err", (*locker.Lock).Err},
		{"Context().Err", func(l *locker.Lock) error { return l.Context().Err() }},
		{"Extend", func(l *locker.Lock) error { return l.Extend(t.ctx) }},
		{"Release", func(l *locker.Lock) error { return l.Release(t.ctx) }},
	} {
		lock := t.hold(client, t.key(long.name), locker.WithoutHeartbeat())
		machine.suspend(t.TTL + time.Second)
		err := long.look(lock.Lock)
		if lost := t.loss(context.Cause(lock.Context())); err == nil || lost.Reason != locker.ReasonExpired {
			t.Errorf("%s after a suspend of %v says %v, and the cause is %v", long.name, t.TTL+time.Second, err, lost)
		}
	}

	// Times that carry a monotonic reading are compared by it: the wall clock may step by an hour.
	lease := t.acquire(machine, t.key("lease"))
	lock = t.hold(client, t.key("wall"))
	for what, at := range map[string]time.Time{"Lease.Start": lease.Start, "Lock.Deadline": lock.Deadline()} {
		if !strings.Contains(at.String(), " m=") {
			t.Errorf("%s carries no monotonic reading: it would follow a step of the wall clock", what)
		}
	}
	if err := lock.Release(t.ctx); err != nil && !errors.Is(err, locker.ErrLost) {
		t.Errorf("release: %v", err)
	}
}
