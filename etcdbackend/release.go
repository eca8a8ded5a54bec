package etcdbackend

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
)

// Release implements [locker.Locker].
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	inner, leave, err := b.enter(ctx)
	if err != nil {
		return b.fail(ctx, "release", lease.Key, err)
	}
	defer leave()
	if lease.Token == 0 && lease.State == nil {
		err = b.withdraw(inner, lease.ID)
	} else {
		err = b.release(inner, lease)
	}
	if err == nil || errors.Is(err, locker.ErrLost) {
		return err
	}
	return b.fail(ctx, "release", lease.Key, err)
}

// release gives up a lock that was granted. The key decides: its lease may be alive although the lock was taken away.
func (b *Backend) release(ctx context.Context, lease locker.Lease) error {
	g, err := b.grantOf(lease)
	if err != nil {
		return err
	}
	if err := g.take(ctx); err != nil {
		return err
	}
	defer g.pass()
	switch {
	case g.gone:
		return locker.ErrLost
	case g.over:
		return nil
	}
	deleted, err := b.deleteKey(ctx, g)
	if err != nil {
		return err
	}
	// When this answer was given the server could not have expired the lock yet: an earlier try has deleted it.
	inTime := time.Now().Before(g.lease.counts().Add(g.lease.ttl))
	if deleted || g.deletes.Load() > 1 && inTime {
		if err := b.forbid(ctx, g); err != nil {
			return err
		}
		b.finish(g)
		b.retire(g)
		return nil
	}
	b.finish(g)
	g.gone = true
	b.dropLease(g.lease)
	return locker.ErrLost
}

// deleteKey deletes the request's key, and tells whether it was there. No other request has this key as long as its lease
// is not used again, and it is not if this was sent twice: see retire. When ctx ends it is sent once more: a library that is
// told to cancel a request makes the server drop it, and the lock would stay until its TTL is over.
func (b *Backend) deleteKey(ctx context.Context, g *grant) (deleted bool, err error) {
	sub := g.sub()
	send := func(ctx context.Context) (*clientv3.DeleteResponse, error) {
		g.deletes.Add(1)
		return b.client.Delete(ctx, sub)
	}
	resp, err := ask(ctx, b, send)
	if err == nil {
		b.relay.gone(sub)
		return resp.Deleted > 0, nil
	}
	if ctx.Err() != nil {
		b.work.Go(func() {
			ctx, cancel := context.WithTimeout(b.ctx, g.lease.ttl)
			defer cancel()
			if _, err := ask(ctx, b, send); err == nil {
				b.relay.gone(sub)
			}
		})
	}
	return false, err
}

// forbid keeps a request's key from being made by what may still be on its way, if anything is: not without its lease.
func (b *Backend) forbid(ctx context.Context, g *grant) error {
	if !g.unsure && g.puts.Load() <= 1 {
		return nil
	}
	return b.revoke(ctx, g.lease)
}

// finish ends a request for good. Its turn is the caller's.
func (b *Backend) finish(g *grant) {
	g.over = true
	g.end()
	b.requests.finish(g.id)
}

// withdraw undoes a request, however far it has come.
func (b *Backend) withdraw(ctx context.Context, id string) error {
	g := b.requests.find(id)
	if g == nil {
		b.requests.finish(id)
		return nil
	}
	g.mu.Lock()
	if g.stop != nil {
		g.stop()
	}
	g.mu.Unlock()
	if err := g.take(ctx); err != nil {
		return err
	}
	defer g.pass()
	switch {
	case g.over, g.lease == nil:
	case g.unsure || g.puts.Load() > 1:
		if err := b.forbid(ctx, g); err != nil {
			return err
		}
		b.relay.gone(g.sub())
	case g.revision == 0:
		b.retire(g)
	default:
		deleted, err := b.deleteKey(ctx, g)
		if err != nil {
			return err
		}
		if deleted {
			b.retire(g)
		} else {
			b.dropLease(g.lease)
		}
	}
	b.finish(g)
	return nil
}
