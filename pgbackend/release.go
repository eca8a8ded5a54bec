package pgbackend

import (
	"context"
	"errors"
	"time"

	"github.com/fec20105/locker"
)

// Extend implements [locker.Locker].
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	if err := b.ready(ctx); err != nil {
		return lease, b.fail("extend", lease.Key, err)
	}
	g, err := b.grantOf(lease)
	if err != nil {
		return lease, b.fail("extend", lease.Key, err)
	}
	b.mu.Lock()
	state, h := g.state, g.holder
	if state == held && b.timeIsOver(g) {
		state = over
	}
	b.mu.Unlock()
	switch state {
	case held:
	case orphan:
		return lease, b.lostOr(ctx, "extend", g)
	default:
		return lease, locker.ErrLost
	}

	st, err := h.ask(ctx, "EXECUTE locker_pulse")
	switch {
	case err != nil && h.fate() != nil && ctx.Err() == nil:
		return lease, b.lostOr(ctx, "extend", g)
	case err != nil:
		return lease, b.fail("extend", lease.Key, err)
	case st.rows[0][0] != h.pid:
		_ = h.conn.Close() // the locks are on another session, if anywhere
		return lease, b.fail("extend", lease.Key, errors.New(poolerCure))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if g.state != held {
		return lease, locker.ErrLost
	}
	if st.start.After(g.start.Mono) {
		g.start = b.at(st.start)
	}
	lease.Start, lease.TTL = g.start.Mono, g.timer().ttl
	return lease, nil
}

// lostOr waits until it is certain that the ended session of a grant holds nothing any more.
func (b *Backend) lostOr(ctx context.Context, op string, g *grant) error {
	if err := b.wait(ctx, op, g, b.endOf(g)); err != nil {
		return err
	}
	return locker.ErrLost
}

// Release implements [locker.Locker].
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	if err := b.ready(ctx); err != nil {
		return b.fail("release", lease.Key, err)
	}
	if lease.Token == 0 && lease.State == nil {
		return b.withdraw(ctx, lease)
	}
	g, err := b.grantOf(lease)
	if err != nil {
		return b.fail("release", lease.Key, err)
	}
	b.mu.Lock()
	var h *holder
	if g.state == held {
		b.offer(g)
	}
	if g.state == held {
		b.finish(g.req.ID)
		g.tried, h = true, g.holder
		if !b.pass(g) {
			b.free(g)
		}
	}
	b.mu.Unlock()
	if h != nil {
		h.flush()
	}
	return b.verdict(ctx, g)
}

// verdict waits for the end of a grant. A waiter tells of a grant before it has opened the gate again, so a lock that is
// released at once may be free behind a gate at which others fail: wait for that too.
func (b *Backend) verdict(ctx context.Context, g *grant) error {
	err := b.wait(ctx, "release", g, b.endOf(g))
	if err == nil && g.behind != nil {
		err = b.wait(ctx, "release", g, g.behind)
	}
	if err != nil {
		return err
	}
	if g.lost {
		return locker.ErrLost
	}
	return nil
}

func (b *Backend) endOf(g *grant) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return g.end()
}

func (b *Backend) wait(ctx context.Context, op string, g *grant, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-b.ctx.Done():
		return locker.ErrClosed
	case <-ctx.Done():
		return b.fail(op, g.req.Key, ctx.Err())
	}
}

// withdraw undoes a request whatever has become of it.
func (b *Backend) withdraw(ctx context.Context, lease locker.Lease) error {
	b.mu.Lock()
	b.finish(lease.ID)
	g := b.requests[lease.ID]
	if g == nil || g.req.Key != lease.Key {
		b.mu.Unlock()
		return nil
	}
	var h *holder
	if g.state == held {
		h = g.holder
		b.free(g)
	} else {
		b.abandon(g)
	}
	b.mu.Unlock()
	if h != nil {
		h.flush()
	}
	if err := b.verdict(ctx, g); !errors.Is(err, locker.ErrLost) {
		return err
	}
	return nil
}

// grantOf refuses leases that this Backend has not granted.
func (b *Backend) grantOf(lease locker.Lease) (*grant, error) {
	if g, ok := lease.State.(*grant); ok && g.holder != nil && g.holder.backend == b {
		return g, nil
	}
	return nil, errors.New("the lease was granted by another Locker: give it back to that one")
}

// finish remembers a request that is over.
func (b *Backend) finish(id string) {
	if !b.isFinished(id) {
		b.finished[id] = struct{}{}
		b.forget = append(b.forget, finished{id, time.Now()})
	}
}

func (b *Backend) isFinished(id string) bool {
	for len(b.forget) > 0 && time.Since(b.forget[0].at) > remembered {
		delete(b.finished, b.forget[0].id)
		b.forget = b.forget[1:]
	}
	_, ok := b.finished[id]
	return ok
}
