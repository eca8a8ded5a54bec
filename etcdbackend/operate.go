package etcdbackend

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
)

// Inspect implements [locker.Inspector]. What remains of a lock is told in whole seconds.
func (b *Backend) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	inner, leave, err := b.enter(ctx)
	if err != nil {
		return locker.Holding{}, b.fail(ctx, "inspect", key, err)
	}
	defer leave()
	h, err := b.inspect(inner, key)
	if err != nil {
		return locker.Holding{}, b.fail(ctx, "inspect", key, err)
	}
	return h, nil
}

func (b *Backend) inspect(ctx context.Context, key string) (locker.Holding, error) {
	queue := b.layout.queue(key)
	resp, err := ask(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return b.client.Txn(ctx).Then(
			clientv3.OpGet(queue, clientv3.WithFirstCreate()...),
			clientv3.OpGet(queue, clientv3.WithPrefix(), clientv3.WithCountOnly()),
		).Commit()
	})
	if err != nil {
		return locker.Holding{}, err
	}
	front := resp.Responses[0].GetResponseRange().Kvs
	if len(front) == 0 {
		return locker.Holding{Key: key}, nil
	}
	h := b.holding(front[0])
	h.Waiters = int(resp.Responses[1].GetResponseRange().Count) - 1
	left, err := ask(ctx, b, func(ctx context.Context) (*pb.LeaseTimeToLiveResponse, error) {
		return b.leaseClient.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: front[0].Lease})
	})
	if err == nil {
		h.Remaining = time.Duration(max(left.TTL, 0)) * time.Second
	}
	return h, err
}

// holding reads the key of a holder.
func (b *Backend) holding(kv *mvccpb.KeyValue) locker.Holding {
	e := readEntry(kv.Value)
	return locker.Holding{
		Key: b.layout.nameOf(string(kv.Key)), ID: e.ID, Holder: e.Holder, Token: uint64(kv.CreateRevision), Since: e.since(),
	}
}

// listPage is how many keys one step of a List reads.
const listPage = 500

// List implements [locker.Lister]. It does not tell how long the locks remain: that is a question for each, see Inspect.
func (b *Backend) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		inner, leave, err := b.enter(ctx)
		if err == nil {
			err = b.list(inner, func(h locker.Holding) bool { return yield(h, nil) })
			leave()
		}
		if err != nil {
			yield(locker.Holding{}, b.fail(ctx, "list", "", err))
		}
	}
}

func (b *Backend) list(ctx context.Context, yield func(locker.Holding) bool) error {
	first, end := b.layout.locks()
	var h locker.Holding // of the queue that is being read: its keys are neighbours
	for {
		resp, err := ask(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) {
			return b.client.Get(ctx, first, clientv3.WithRange(end), clientv3.WithLimit(listPage))
		})
		if err != nil {
			return err
		}
		for _, kv := range resp.Kvs {
			next := b.holding(kv)
			switch {
			case next.Key != h.Key:
				if h.Token != 0 && !yield(h) {
					return nil
				}
				h = next
			case next.Token < h.Token:
				next.Waiters = h.Waiters + 1
				h = next
			default:
				h.Waiters++
			}
		}
		if !resp.More {
			if h.Token != 0 {
				yield(h)
			}
			return nil
		}
		first = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// Break implements [locker.Breaker]. The holder is told at once if its link is alive.
func (b *Backend) Break(ctx context.Context, held locker.Holding) error {
	inner, leave, err := b.enter(ctx)
	if err != nil {
		return b.fail(ctx, "break", held.Key, err)
	}
	defer leave()
	err = b.breakLock(inner, held)
	if err == nil || errors.Is(err, locker.ErrLost) {
		return err
	}
	return b.fail(ctx, "break", held.Key, err)
}

func (b *Backend) breakLock(ctx context.Context, held locker.Holding) error {
	if held.Token == 0 {
		return locker.ErrLost
	}
	queue := b.layout.queue(held.Key)
	resp, err := ask(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return b.client.Get(ctx, queue, clientv3.WithFirstCreate()...)
	})
	if err != nil {
		return err
	}
	if len(resp.Kvs) == 0 || uint64(resp.Kvs[0].CreateRevision) != held.Token {
		return locker.ErrLost
	}
	kv := resp.Kvs[0]
	sub := string(kv.Key)
	holder := readEntry(kv.Value)
	notice := b.layout.notices(holder.Locker) + holder.ID
	// The notice is tied to the broken lock's lease, which nobody renews any more.
	broken, err := b.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(sub), "=", kv.CreateRevision)).
		Then(clientv3.OpDelete(sub), clientv3.OpPut(notice, "", clientv3.WithLease(clientv3.LeaseID(kv.Lease)))).
		Commit()
	if err != nil {
		return err
	}
	if !broken.Succeeded {
		return locker.ErrLost
	}
	b.relay.gone(sub)
	return nil
}

// notices tells of locks that were broken. A watch on all locks would hear of every release of everybody, and one for
// each would cost as much as the lock.
type notices struct{ once sync.Once }

// listen begins to watch when the first lock wants it.
func (n *notices) listen(b *Backend) {
	n.once.Do(func() { b.work.Go(func() { b.listen() }) })
}

// listen watches until Close.
func (b *Backend) listen() {
	prefix := b.layout.notices(b.name)
	for revision := b.opened + 1; b.ctx.Err() == nil; {
		ctx, cancel := context.WithCancel(b.ctx)
		events := b.client.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix(), clientv3.WithRev(revision), clientv3.WithFilterDelete())
		for resp := range events {
			if resp.CompactRevision > 0 { // heartbeats find what was missed
				revision = resp.CompactRevision
			}
			if resp.Err() != nil {
				break
			}
			for _, e := range resp.Events {
				revision = e.Kv.ModRevision + 1
				b.broken(string(e.Kv.Key)[len(prefix):])
			}
		}
		cancel()
		pause := time.NewTimer(rewatchPause)
		select {
		case <-pause.C:
		case <-b.ctx.Done():
			pause.Stop()
		}
	}
}

// broken tells the holder of a lock that it was taken away.
func (b *Backend) broken(id string) {
	g := b.requests.find(id)
	if g == nil || g.hasEnded() {
		return
	}
	g.end()
	if g.lost != nil {
		g.lost(locker.ReasonTaken)
	}
}
