package locker

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/fec20105/locker/internal/clock"
)

// This file holds what a Lock does by itself while it is held: renew, retry, warn.

// The most renewals of one lock that its heartbeat has under way at a time.
const maxTries = 8

// step runs whenever the timer fires, on a goroutine of its own that ends with it: it decides what is due, sets
// the timer for what is next, and makes one try to renew if that was it.
func (l *Lock) step() {
	l.mu.Lock()
	now := l.client.clock.Now()
	if l.check(now) != nil {
		clean := !l.cleaning && !l.cleanAt.IsZero() && !now.Mono.Before(l.cleanAt)
		l.cleaning = l.cleaning || clean
		l.mu.Unlock()
		if clean {
			l.cleanUp()
		}
		return
	}
	if l.warnsIn(now) <= 0 {
		l.warned = true
		l.client.work.Go(func() { l.settings.warn(l) })
	}
	renew := false
	if l.renewsIn(now) <= 0 {
		l.failing = l.failing || l.asked // that one should have been answered by now
		l.asked = true
		l.nextTry = now.Mono.Add(l.patience(now))
		if renew = l.tries < maxTries; renew {
			l.tries++
			l.client.work.Add(1) // while the lock itself is counted
		}
	}
	l.timer.Reset(l.untilNext(now))
	l.mu.Unlock()
	if renew {
		defer l.client.work.Done()
		_ = l.renew(l.ctx) // its outcome is in the lock
	}
}

// patience is how long a try may be unanswered before the next one begins. Towards the deadline they come closer to each other,
// because an outage may end shortly before; and those that are left reach until then.
func (l *Lock) patience(now clock.Reading) time.Duration {
	left := l.left(now)
	return max(l.every()/8, min(l.every()/2, left/3), left/time.Duration(max(maxTries-l.tries, 1)))
}

// untilNext tells when step has something to do again.
func (l *Lock) untilNext(now clock.Reading) time.Duration {
	next := min(l.left(now), l.renewsIn(now), l.warnsIn(now), l.lease.TTL/3) // timers stand still in a suspend: look now and then
	if l.settings.maxHold > 0 {
		next = min(next, l.settings.maxHold-l.held(now))
	}
	return max(next, 0)
}

const never = MaxTTL

func (l *Lock) renewsIn(now clock.Reading) time.Duration {
	if l.settings.noHeartbeat {
		return never
	}
	return l.nextTry.Sub(now.Mono)
}

func (l *Lock) warnsIn(now clock.Reading) time.Duration {
	if l.settings.warn == nil || l.warned || !l.failing && !l.settings.noHeartbeat {
		return never
	}
	return l.left(now) - l.settings.warnBefore
}

// renew makes one try, which the caller has counted in tries. Tries overlap rather than cut each other off: each may be
// answered until the deadline that stood when it began, and counts from its own send.
func (l *Lock) renew(ctx context.Context) error {
	l.mu.Lock()
	lease, deadline := l.lease, l.deadline
	l.mu.Unlock()
	ctx, cancel := context.WithDeadline(ctx, deadline)
	before := l.client.clock.Now()
	fresh, err := l.client.locker.Extend(ctx, lease)
	after := l.client.clock.Now()
	if err == nil {
		err = ctx.Err() // a server may answer at the very moment of expiry: what comes later than that does not count
	}
	over := ctx.Err() != nil
	cancel()

	err, failed := l.renewed(fresh, err, over, before, after)
	if failed {
		l.settings.logger.WarnContext(ctx, "renewal failed", "key", lease.Key, "token", lease.Token, "deadline", deadline, "error", err)
	}
	return err
}

// renewed takes in how a try has ended. It answers the error for whoever asked for the renewal, and whether the server or the
// way there has failed.
func (l *Lock) renewed(fresh Lease, err error, over bool, before, after clock.Reading) (_ error, failed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tries--; l.tries == 0 && l.idle != nil {
		close(l.idle)
		l.idle = nil
	}
	if end := l.check(after); end != nil {
		return end, false // also when the answer was good: it came after the trust had run out
	}
	switch {
	case errors.Is(err, ErrLost):
		l.lose(ReasonTaken, after)
		return l.end, false
	case err == nil && after.Parted(before):
		err = errSuspended
		l.nextTry = after.Mono
	case err == nil:
		if fresh.Start.After(l.lease.Start) {
			l.accept(fresh, before, after)
			if end := l.check(after); end != nil {
				return end, false
			}
		}
	case over, before.Mono.Before(l.lease.Start):
		// The caller gave up, or a later try has renewed meanwhile: this one says nothing of the server.
	default:
		l.failing = true
		most := min(l.every()/2, max(l.every()/16, l.left(after)/6)) // an outage may end shortly before the deadline
		l.nextTry = after.Mono.Add(backoff(l.every()/16, most, l.failures))
		l.failures++
		failed = true
	}
	l.timer.Reset(l.untilNext(after))
	return err, failed
}

// backoff doubles from least to most, and takes a random part of it, so that many who failed together do not come back together.
func backoff(least, most time.Duration, failures int) time.Duration {
	d := min(least<<min(failures, 8), most)
	return d/2 + rand.N(d+1)
}
