package filebackend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fec20105/locker"
)

// errWithdrawn is the answer to a request that was released or withdrawn before it came.
var errWithdrawn = errors.New("the request was withdrawn before it came: ask again with a new ID")

// Acquire implements [locker.Locker].
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	if err := b.begin(ctx); err != nil {
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	defer b.calls.RUnlock()
	b.sweepNow()
	if !req.NoWait || req.Lost != nil {
		b.mail.add(req)
	}
	g, err := b.wait(ctx, req)
	if err != nil {
		b.mail.remove(req.ID)
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	b.mail.granted(req.ID)
	return locker.Lease{
		Key: req.Key, ID: req.ID, Holder: req.Holder, Token: g.Token, TTL: g.TTL,
		Start: startOf(g), State: &held{backend: b},
	}, nil
}

// startOf is the moment of a grant on this process's monotonic clock. That clock is read first, so that the moment is never
// too late; and where the machine was suspended since the grant it is too early by as much.
func startOf(g *grant) time.Time {
	mono := time.Now()
	return mono.Add(-(bootNow() - (g.Until - g.TTL)))
}

// wait asks, and looks again when it is woken, when the holder's lease should have ended, and from time to time.
func (b *Backend) wait(ctx context.Context, req locker.Request) (*grant, error) {
	for {
		if !req.NoWait || req.Lost != nil {
			if err := b.mail.open(); err != nil {
				return nil, err
			}
		}
		g, place, err := b.enter(ctx, req)
		if err != nil || g != nil {
			return g, err
		}
		b.mail.listen()
		for place != nil {
			if err := b.pause(ctx, req.ID, place.delay(b.mail.watched())); err != nil {
				return nil, fmt.Errorf("%w while waiting: %w", err, &place.held)
			}
			s, err := b.folder.read(req.Key)
			if err != nil {
				return nil, fmt.Errorf("%w while waiting: %w", err, &place.held)
			}
			now := bootNow()
			if s.heldAt(now) && s.Holder.ID == req.ID {
				return s.Holder, nil
			}
			// Without a place in it: nobody holds the lock, or this place was granted and has ended, or the file was
			// deleted by hand. Then it asks again.
			place = s.place(req, now)
		}
	}
}

// enter grants the key to req if it is free, else queues req. An ID is granted and queued once, however often it asks.
func (b *Backend) enter(ctx context.Context, req locker.Request) (g *grant, p *place, err error) {
	err = b.folder.change(ctx, req.Key, func(c *change) error {
		asking := entry{ID: req.ID, Label: req.Holder, TTL: max(req.TTL, locker.MinTTL), Mailbox: b.mail.name()}
		switch {
		case b.over.has(req.ID):
			return errWithdrawn
		case c.state.Holder == nil:
			if err := c.grant(asking); err != nil {
				return err
			}
			g = c.state.Holder
			return nil
		case c.state.Holder.ID == req.ID:
			g = c.state.Holder
			return nil
		case req.NoWait:
			return c.state.heldError(c.now)
		}
		if p = c.state.place(req, c.now); p == nil {
			c.state.Queue = append(c.state.Queue, asking)
			c.dirty = true
			p = c.state.place(req, c.now)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return g, p, nil
}

// place is a request's place in the queue when it was last looked at.
type place struct {
	held   locker.HeldError
	number int // the first is 0
}

// delay is the time until the next look. Nobody tells of a lease that ends by itself, so its end is a reason to look.
// The first in the queue looks first, so that the others find the work done.
func (p *place) delay(watched bool) time.Duration {
	look := fallback
	if !watched {
		look = unwatched
	}
	return min(look, p.held.Remaining+time.Duration(min(p.number, 15))*2*time.Millisecond)
}

// pause waits for the time of the next look.
func (b *Backend) pause(ctx context.Context, id string, delay time.Duration) error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-b.mail.wake(id):
		return nil
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-b.closed:
		return locker.ErrClosed
	}
}

// stillHolds is false if it is certain that the lock was taken away from its holder.
func (b *Backend) stillHolds(key, id string) bool {
	s, err := b.folder.read(key)
	return err != nil || s.Holder != nil && s.Holder.ID == id
}
