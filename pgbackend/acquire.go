package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/clock"
)

// Acquire implements [locker.Locker].
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
	const tries = 5
	for try := 1; ; try++ {
		if err := b.ready(ctx); err != nil {
			return locker.Lease{}, b.fail("acquire", req.Key, err)
		}
		began := time.Now()
		g, mine, free, err := b.request(req)
		for errors.Is(err, errUnsure) && b.ownerDecided(ctx, req.Key) {
			g, mine, free, err = b.request(req)
		}
		if errors.Is(err, errUnsure) {
			return locker.Lease{}, b.fail("acquire", req.Key, fmt.Errorf("%w: %w", ctx.Err(), err))
		}
		if err == nil && free {
			err = b.question(ctx, g, "locker_ask", nil)
		}
		if err == nil {
			err = b.await(ctx, g, mine)
		}
		if errors.Is(err, errSession) && try < tries && !b.tooSlow(g, began) {
			// The session may have ended long before. Ask again once it is certain that it holds nothing.
			select {
			case <-b.endOf(g):
				continue
			case <-ctx.Done():
			case <-b.ctx.Done():
			}
		}
		switch held := (*locker.HeldError)(nil); {
		case err == nil && !mine:
			return b.again(ctx, g)
		case err == nil:
			return b.lease(g), nil
		case errors.As(err, &held) && ctx.Err() == nil && req.NoWait:
			return locker.Lease{}, held
		}
		return locker.Lease{}, b.fail("acquire", req.Key, err)
	}
}

// tooSlow tells that a session which was opened for this try has ended because its answer was not here within the TTL. The next
// one's would not be either.
func (b *Backend) tooSlow(g *grant, began time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := g.holder
	return h != nil && h.made.After(began) && time.Since(h.made) >= g.timer().ttl
}

// errSession is matched by the failure of a question whose session ended before it was answered.
var errSession = errors.New("the session of the lock ended")

// request notes a request, or finds it where it was made before. What is free as far as this process knows is to be asked for at the
// server; else the request waits, and others may have asked for it before this returns.
func (b *Backend) request(req locker.Request) (g *grant, mine, free bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch g := b.requests[req.ID]; {
	case b.closed:
		return nil, false, false, locker.ErrClosed
	case b.isFinished(req.ID):
		return nil, false, false, errWithdrawn
	case g != nil && g.req.Key != req.Key:
		return nil, false, false, errors.New("the request's ID is that of a request for another key: mint one for each")
	case g != nil:
		return g, false, false, nil
	}
	g = &grant{
		req: req, space: spaceOf(b.opts.Prefix, req.Key),
		answered: make(chan struct{}),
	}
	e := b.entry(g)
	if e.leaving > 0 {
		e.offers = offers
	}
	taken := e.owner != nil || len(e.queue) > 0
	switch {
	case taken && req.NoWait && len(e.queue) == 0 && e.owner.state != held:
		return nil, false, false, errUnsure
	case taken && req.NoWait:
		return nil, false, false, &locker.HeldError{Key: req.Key}
	}
	b.requests[req.ID] = g
	if taken {
		g.sawHeld = true
		b.queue(e, g, false)
		return g, true, false, nil
	}
	e.owner = g
	return g, true, true, nil
}

// errUnsure is the failure of a request that does not wait while another of this process may get its key, or have lost it: only
// the server's answer to that one tells whether the key is held.
var errUnsure = errors.New("the outcome of an earlier request for the key is not known")

// ownerDecided waits until more is known of the request that may own a key. It is false if ctx ends before.
func (b *Backend) ownerDecided(ctx context.Context, key string) bool {
	var answered <-chan struct{}
	b.mu.Lock()
	if e := b.keys[key]; e != nil && e.owner != nil {
		answered = e.owner.answered
	}
	b.mu.Unlock()
	var out <-chan time.Time
	if answered == nil { // it is on its way out
		pause := time.NewTimer(time.Millisecond)
		defer pause.Stop()
		out = pause.C
	}
	select {
	case <-answered:
	case <-out:
	case <-b.ctx.Done():
	case <-ctx.Done():
		return false
	}
	return true
}

// question sends the question, which is answered by asked: then done is closed.
func (b *Backend) question(ctx context.Context, g *grant, prepared string, done chan struct{}) error {
	for {
		b.mu.Lock()
		if g.abandoned {
			b.refuse(g, errWithdrawn)
			b.mu.Unlock()
			return errWithdrawn
		}
		h := b.holderFor(g.timer())
		if h != nil {
			if g.asked = done; b.put(g, h, prepared) {
				b.mu.Unlock()
				h.flush()
				return nil
			}
		}
		b.mu.Unlock()
		if err := b.openHolder(ctx, g.timer()); err != nil {
			b.mu.Lock()
			b.refuse(g, err)
			b.mu.Unlock()
			return err
		}
	}
}

// put puts the question behind what is to be sent.
func (b *Backend) put(g *grant, h *holder, prepared string) bool {
	sql := fmt.Sprintf("EXECUTE %s(%d, %d, %d)", prepared, g.space.lock, g.space.gate, g.space.mark)
	if _, err := h.enqueue(sql, func(st *statement) { b.asked(g, h, st) }); err != nil {
		return false
	}
	b.note(g, h)
	return true
}

// note notes that a session is being asked for a grant.
func (b *Backend) note(g *grant, h *holder) {
	if len(h.grants) == 0 {
		h.first = time.Now()
	}
	g.holder, g.state = h, asking
	h.grants[g] = struct{}{}
}

// asked takes in the answer of the session. It runs on that session's reader, so that the answers to two questions are
// taken in in the order in which the server gave them.
func (b *Backend) asked(g *grant, h *holder, st *statement) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.askedLocked(g, h, st)
}

func (b *Backend) askedLocked(g *grant, h *holder, st *statement) {
	switch granted := st.err == nil && st.rows[0][0] != ""; {
	case st.err != nil && h.fate() != nil:
		g.state = orphan
		b.answer(g, fmt.Errorf("%w: %w", errSession, h.fate()))
	case st.err != nil:
		// The lock may have been taken before the rest failed.
		b.answer(g, st.err)
		b.free(g)
		b.spawnLocked(h.flush)
	case !granted:
		g.sawHeld = true
		b.leave(g)
		switch e := b.keys[g.req.Key]; {
		case g.req.NoWait || g.abandoned:
			b.refuse(g, &locker.HeldError{Key: g.req.Key})
		default:
			if e.owner == g {
				e.owner = nil
			}
			b.queue(e, g, true)
		}
	default:
		if g.start = b.at(st.start); g.turn == 0 {
			g.turn = g.start.Boot
		}
		if b.tokens.Load().transactions {
			b.spawnLocked(func() { b.draw(g, h) })
			return
		}
		var err error
		if g.token, err = drawn(st); err != nil {
			b.answer(g, err)
			b.free(g)
			b.spawnLocked(h.flush)
			break
		}
		b.granted(g)
	}
	g.wasAsked()
}

// wasAsked tells that the session has answered.
func (g *grant) wasAsked() {
	if g.asked != nil {
		close(g.asked)
		g.asked = nil
	}
}

// at is what the clocks showed at a moment that has passed: the boot clock is read now, and what has passed since is taken from the
// monotonic one.
func (b *Backend) at(moment time.Time) clock.Reading {
	now := b.clock.Now()
	return clock.Reading{Mono: moment, Boot: now.Boot - now.Mono.Sub(moment)}
}

// granted begins the life of a lease.
func (b *Backend) granted(g *grant) {
	if g.abandoned {
		b.answer(g, errWithdrawn)
		b.free(g)
		b.spawnLocked(g.holder.flush)
		return
	}
	g.state = held
	g.holder.dueIn(max(g.left(b.clock.Now()), 0))
	b.answer(g, nil)
	b.list(b.keys[g.req.Key]) // others may have begun to wait behind it
}

// draw gets a token where there is no sequence, and lets others see it.
func (b *Backend) draw(g *grant, h *holder) {
	st, err := b.askControl(b.ctx, b.tokens.Load().drawToken())
	var token uint64
	if err == nil {
		token, err = drawn(st)
	}
	b.mu.Lock()
	defer h.flush()
	defer b.mu.Unlock()
	if err == nil && g.state == asking {
		g.token = token
		class, object := g.space.marked(token)
		_, err = h.enqueue(fmt.Sprintf("SELECT pg_try_advisory_lock_shared(%d, %d)", class, object), func(st *statement) { b.drew(g, h, st.err) })
		if err == nil {
			return
		}
	}
	b.drewLocked(g, h, err)
}

// drew takes in what became of the token.
func (b *Backend) drew(g *grant, h *holder, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drewLocked(g, h, err)
}

func (b *Backend) drewLocked(g *grant, h *holder, err error) {
	switch fate := h.fate(); {
	case fate != nil:
		if g.state != over { // the end of the session may have been dealt with while the token was drawn
			g.state = orphan
		}
		b.answer(g, fmt.Errorf("%w: %w", errSession, fate))
	case err != nil:
		b.answer(g, err)
		b.free(g)
		b.spawnLocked(h.flush)
	default:
		b.granted(g)
	}
	g.wasAsked()
}

// answer ends the wait of Acquire.
func (b *Backend) answer(g *grant, err error) {
	if g.answered != nil {
		g.err = err
		close(g.answered)
		g.answered = nil
	}
}

// refuse ends a request that left nothing at the server.
func (b *Backend) refuse(g *grant, err error) {
	b.answer(g, err)
	b.settle(g, false)
}

// leave notes that a session which was asked does not hold the lock.
func (b *Backend) leave(g *grant) {
	if h := g.holder; h != nil {
		if delete(h.grants, g); len(h.grants) == 0 {
			h.empty = time.Now()
		}
		g.holder = nil
	}
}

// await waits for the outcome of a request. When ctx ends, nobody wants it any more, unless somebody else has made it.
func (b *Backend) await(ctx context.Context, g *grant, mine bool) error {
	b.mu.Lock()
	answered := g.answered
	b.mu.Unlock()
	if answered == nil {
		return g.err
	}
	select {
	case <-answered:
		return g.err
	case <-b.ctx.Done():
		return locker.ErrClosed
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if mine {
		b.abandon(g)
	}
	if g.sawHeld {
		return fmt.Errorf("%w while waiting: %w", ctx.Err(), &locker.HeldError{Key: g.req.Key})
	}
	return ctx.Err()
}

// abandon withdraws a request that was not answered. If it was granted already, its lease ends with its TTL.
func (b *Backend) abandon(g *grant) {
	switch g.state {
	case asking:
		g.abandoned = true
	case queued:
		b.unqueue(g)
	}
}

// lease is the lease of a grant.
func (b *Backend) lease(g *grant) locker.Lease {
	b.mu.Lock()
	defer b.mu.Unlock()
	return locker.Lease{
		Key: g.req.Key, ID: g.req.ID, Holder: g.req.Holder,
		Token: g.token, TTL: g.timer().ttl, Start: g.start.Mono, State: g,
	}
}

// again answers a request that was made before and holds its lock. It counts from now, so the server must too.
func (b *Backend) again(ctx context.Context, g *grant) (locker.Lease, error) {
	lease, err := b.Extend(ctx, b.lease(g))
	if errors.Is(err, locker.ErrLost) {
		return locker.Lease{}, b.fail("acquire", g.req.Key, errWithdrawn)
	}
	return lease, err
}
