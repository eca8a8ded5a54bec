package etcdbackend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
)

var (
	errPlaceLost = errors.New("the server has ended this request's place in the queue: ask again")
	errIdleLease = errors.New("a server lease that was kept for the next lock ended before it was renewed")
)

// place is where a request stands in the queue for its lock.
type place struct {
	first  bool
	before string // the key of the request before it
	deep   bool   // others are before that one, and it is not known who holds the lock
	seen   int64  // the revision in which that was so
	held   locker.HeldError
}

// Acquire implements [locker.Locker].
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, b.fail(ctx, "acquire", req.Key, err)
	}
	inner, leave, err := b.enter(ctx)
	if err != nil {
		return locker.Lease{}, b.fail(ctx, "acquire", req.Key, err)
	}
	defer leave()
	lease, err := b.acquire(inner, req)
	if held, ok := err.(*locker.HeldError); ok { //nolint:errorlint // the bare answer of a request that only asks
		return locker.Lease{}, held
	}
	if err != nil {
		return locker.Lease{}, b.fail(ctx, "acquire", req.Key, err)
	}
	return lease, nil
}

func (b *Backend) acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	g, err := b.requests.open(b, req)
	if err != nil {
		return locker.Lease{}, err
	}
	if err := g.take(ctx); err != nil {
		return locker.Lease{}, err
	}
	defer g.pass()
	switch {
	case g.over:
		return locker.Lease{}, errWithdrawn
	case g.held:
		return g.leaseNow(), nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g.mu.Lock()
	g.stop = func() { cancel(errWithdrawn) }
	g.mu.Unlock()
	if req.Lost != nil {
		b.notices.listen(b)
	}

	err = b.stand(ctx, req, g)
	if errors.Is(context.Cause(ctx), errWithdrawn) {
		err = errWithdrawn
	}
	if err != nil {
		if held, ok := err.(*locker.HeldError); ok { //nolint:errorlint // see Acquire
			if err := b.forbid(ctx, g); err != nil {
				return locker.Lease{}, fmt.Errorf("%w; a copy of the request may come late: %w", held, err)
			}
			b.requests.forget(req.ID)
			b.retire(g)
			return locker.Lease{}, held
		}
		return locker.Lease{}, err
	}
	g.held = true
	return g.leaseNow(), nil
}

// leaseNow is the lease of a lock that is held.
func (g *grant) leaseNow() locker.Lease {
	return locker.Lease{
		Key: g.key, ID: g.id, Holder: g.label, Token: uint64(g.revision), TTL: g.lease.ttl, Start: g.lease.counts(), State: g,
	}
}

// stand enters the queue, and waits in it until the request is the first.
func (b *Backend) stand(ctx context.Context, req locker.Request, g *grant) error {
	if g.lease == nil || g.lease.ttl == 0 { // or it was never granted, as far as is known
		if g.lease != nil {
			b.dropLease(g.lease)
		}
		if g.lease = b.leases.take(b.secondsOf(req.TTL)); g.lease == nil {
			if err := b.newLeaseFor(ctx, req, g); err != nil {
				return err
			}
		}
	}
	err := b.enterQueue(ctx, req, g)
	if !errors.Is(err, rpctypes.ErrLeaseNotFound) && !errors.Is(err, errIdleLease) {
		return err
	}
	// A lease that was idle is gone: nothing is tied to it, and nothing will be. So are others, perhaps.
	if err := b.newLeaseFor(ctx, req, g); err != nil {
		return err
	}
	return b.enterQueue(ctx, req, g)
}

// newLeaseFor has a lease granted for a request.
func (b *Backend) newLeaseFor(ctx context.Context, req locker.Request, g *grant) error {
	g.lease, g.revision, g.unsure = newLease(b.secondsOf(req.TTL)), 0, true
	g.puts.Store(0)
	err := b.grant(ctx, g.lease)
	if err == nil || refused(err) {
		g.unsure = false
	}
	if refused(err) {
		g.lease = nil
	}
	return err
}

// enterQueue makes the request's key. If it is the first of its queue it holds the lock, else it waits.
func (b *Backend) enterQueue(ctx context.Context, req locker.Request, g *grant) error {
	start := time.Now()
	var beat *beat
	if !g.lease.fresh(start) {
		beat = b.pulse.begin(g.lease.id)
	}
	g.unsure = true
	resp, err := ask(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		g.puts.Add(1)
		return b.entry(ctx, req, g).Commit()
	})
	if err != nil {
		if refused(err) && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			g.unsure = false
		}
		return err
	}
	g.unsure = false
	p := b.placeOf(req, g, resp)
	switch {
	case !p.first && req.NoWait:
		return &p.held
	case !p.first:
		return b.wait(ctx, g, p, beat)
	case beat == nil: // what is known of the lease was proven when it was renewed or granted
		return nil
	}
	if err := b.settle(ctx, g, beat, resp.Header.RaftTerm); errors.Is(err, errPlaceLost) {
		return fmt.Errorf("%w: %w", errIdleLease, err)
	} else if err != nil {
		return err
	}
	return nil
}

// entry is the transaction that makes the key, once. Every read in it is paid by whoever takes a lock that is free, so it
// reads no more than the two requests before this one.
func (b *Backend) entry(ctx context.Context, req locker.Request, g *grant) clientv3.Txn {
	queue, sub := b.layout.queue(req.Key), g.sub()
	value := entry{ID: req.ID, Holder: req.Holder, Locker: b.name, Since: time.Now().UnixMilli()}
	put := clientv3.OpPut(sub, value.String(), clientv3.WithLease(g.lease.id))
	if req.NoWait {
		empty := clientv3.Compare(clientv3.CreateRevision(queue), "=", 0).WithPrefix()
		return b.client.Txn(ctx).If(empty).Then(put).Else(clientv3.OpGet(queue, clientv3.WithFirstCreate()...))
	}
	absent := clientv3.Compare(clientv3.CreateRevision(sub), "=", 0)
	last := clientv3.OpGet(queue, clientv3.WithPrefix(), clientv3.WithLimit(2), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend))
	all := clientv3.OpGet(queue, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
	return b.client.Txn(ctx).If(absent).Then(last, put).Else(all)
}

// placeOf reads the answer to an entry.
func (b *Backend) placeOf(req locker.Request, g *grant, resp *clientv3.TxnResponse) place {
	p := place{first: true, seen: resp.Header.Revision, held: locker.HeldError{Key: req.Key}}
	if resp.Succeeded {
		g.revision = resp.Header.Revision
	}
	if resp.Succeeded && req.NoWait {
		return p
	}
	kvs := resp.Responses[0].GetResponseRange().Kvs
	if resp.Succeeded {
		if len(kvs) > 0 {
			p.first, p.before = false, string(kvs[0].Key)
		}
		if len(kvs) == 1 {
			p.held.Holder = readEntry(kvs[0].Value).Holder
		}
		p.deep = len(kvs) > 1
		return p
	}
	sub := g.sub() // whose key an earlier try has made
	for _, kv := range kvs {
		if string(kv.Key) == sub {
			g.revision = kv.CreateRevision
			break
		}
		p.first, p.before = false, string(kv.Key)
	}
	if !p.first {
		p.held.Holder = readEntry(kvs[0].Value).Holder
	}
	return p
}

// settle makes sure that the lease of a request which has become the holder counts from its latest keepalive: see renew.
// The transaction in whose answer the term stood was sent after the keepalive.
func (b *Backend) settle(ctx context.Context, g *grant, beat *beat, term uint64) error {
	err := b.pulse.wait(ctx, beat)
	if err == nil && beat.ttl > 0 && beat.term == term {
		g.lease.renewed(beat.asked)
		return nil
	}
	// That the leader does not know the lease does not mean that it is over: another member may have granted it before
	// the leader, who is behind with his own work, has read of it. The key decides.
	const tries = 3
	for try := 1; ; try++ {
		if _, err = b.renew(ctx, g); err == nil {
			return nil
		}
		if errors.Is(err, locker.ErrLost) {
			return errPlaceLost
		}
		if ctx.Err() != nil || try == tries && !errors.Is(err, errDeposed) {
			return fmt.Errorf("the lock was granted, but its lease could not be renewed: %w", err)
		}
	}
}
