package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/fec20105/locker"
)

const (
	minPoll     = 1250 * time.Millisecond // waiters poll every minPoll to maxPoll, so that they do not come in step
	pollTimeout = 1500 * time.Millisecond // for one poll of a waiter
	retryDelay  = 200 * time.Millisecond  // after a poll that failed

	// A waiter that has lost its place was woken and did not hear it. For a while it polls so often that its next turn
	// does not pass it by, too.
	deafPoll = grace / 2
	deafTime = 5 * time.Second
)

// errWithdrawn is the answer to a request that was released, cleaned up, or granted for a TTL by an answer that was lost.
var errWithdrawn = errors.New("the request is over at the server, because it was withdrawn or its answer was lost: ask again with a new ID")

// Acquire implements [locker.Locker].
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	g := &grant{backend: b, key: req.Key, lost: req.Lost, settled: b.own}
	if !req.NoWait {
		g.wake = make(chan struct{}, 1)
	}
	if !req.NoWait || req.Lost != nil {
		b.notices.add(req.ID, g)
	}
	lease, err := b.wait(ctx, req, g)
	if err != nil {
		b.notices.remove(req.ID)
		return locker.Lease{}, err
	}
	b.notices.granted(req.ID, g)
	lease.State = g
	return lease, nil
}

// wait polls until the lock is granted. It polls when it is woken, when the holder's lease should have ended, and from
// time to time, because messages get lost and those before it vanish.
func (b *Backend) wait(ctx context.Context, req locker.Request, g *grant) (locker.Lease, error) {
	var mode []any
	if req.NoWait {
		mode = []any{"once"}
	}
	b.relay.asks(req.Key)
	lease, place, err := b.poll(ctx, req, g, mode...)
	if err != nil {
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	if place == nil {
		return lease, nil
	}
	if req.NoWait {
		return locker.Lease{}, &place.held
	}
	delay, answered := place.delay(), time.Now()
	var deaf time.Time // until then
	for {
		if err := b.pause(ctx, g, delay); err != nil {
			return locker.Lease{}, b.fail("acquire", req.Key, fmt.Errorf("%w while waiting: %w", err, &place.held))
		}
		lease, next, err := b.pollAgain(ctx, req, g)
		switch {
		case err == nil && next == nil:
			return lease, nil
		case err == nil:
			place, delay, answered = next, next.delay(), time.Now()
			if place.new {
				deaf = answered.Add(deafTime)
			}
			if answered.Before(deaf) {
				delay = min(delay, deafPoll)
			}
		case ended(ctx) == nil && time.Since(answered) < b.outage && !errors.Is(err, locker.ErrClosed) && !errors.Is(err, errWithdrawn):
			delay = retryDelay/2 + rand.N(retryDelay) // the server may be back before it takes this waiter for dead
		default:
			return locker.Lease{}, b.fail("acquire", req.Key, fmt.Errorf("%w while waiting: %w", err, &place.held))
		}
	}
}

// pause waits for the time of the next poll.
func (b *Backend) pause(ctx context.Context, g *grant, delay time.Duration) error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-g.wake:
		return nil
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-b.closed:
		return locker.ErrClosed
	}
}

// pollAgain is a poll that is given up in time for another one.
func (b *Backend) pollAgain(ctx context.Context, req locker.Request, g *grant) (locker.Lease, *position, error) {
	pollCtx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	lease, place, err := b.poll(pollCtx, req, g, "poll")
	if errors.Is(err, context.DeadlineExceeded) && ended(ctx) == nil {
		err = fmt.Errorf("the server did not answer within %v", pollTimeout) // the caller has more time
	}
	return lease, place, err
}

// poll asks the server once, and answers either a lease or a place in the queue.
func (b *Backend) poll(ctx context.Context, req locker.Request, g *grant, mode ...any) (locker.Lease, *position, error) {
	args := append([]any{req.ID, micros(req.TTL), b.channel, req.Holder, b.settled.get(req.Key)}, mode...)
	c := &call{script: acquireScript, key: stateKey(b.prefix, req.Key), args: args, durable: true}
	if err := b.calls.do(ctx, c); err != nil {
		g.settled = false
		b.settled.suspend()
		return locker.Lease{}, nil, err
	}
	g.settled = g.settled && c.sent == 1
	switch reply := c.reply.(type) {
	case int64:
		switch {
		case reply < 0:
			return locker.Lease{}, nil, errWithdrawn
		case !c.confirmed:
			return locker.Lease{}, nil, errReplicas
		}
		ttl := fromMicros(micros(req.TTL))
		return locker.Lease{Key: req.Key, ID: req.ID, Holder: req.Holder, Token: uint64(reply), TTL: ttl, Start: c.start}, nil, nil
	case []any:
		held := locker.HeldError{Key: req.Key, Holder: reply[1].(string), Remaining: fromMicros(reply[0].(int64))}
		return locker.Lease{}, &position{held: held, number: reply[2].(int64), new: reply[3] == int64(1)}, nil
	}
	return locker.Lease{}, nil, fmt.Errorf("the server's answer %v makes no sense", c.reply)
}

// position is a request's place in the queue, as of its last poll.
type position struct {
	held   locker.HeldError
	number int64 // the first is 1
	new    bool  // it had none before
}

// delay is the time until the next poll. Nobody tells of a lease that ends by itself, so its end is a reason to look.
func (p *position) delay() time.Duration {
	spread := time.Duration(max(1, min(p.number, 50))) * 2 * time.Millisecond // the first in the queue comes first
	if p.held.Remaining == 0 {
		return grace + rand.N(spread) // the lock is free, and others were before
	}
	return min(minPoll+rand.N(maxPoll-minPoll), p.held.Remaining+rand.N(spread))
}
