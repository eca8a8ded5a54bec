package etcdbackend

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
)

// checkEvery is how many keepalives of a waiter pass between two looks at its place, which find what a watch has missed.
const checkEvery = 3

// rewatchPause is the pause before a watch that has failed is made again.
const rewatchPause = 100 * time.Millisecond

// wait waits until the request is the first. It watches the request before it, keeps its lease alive, and asks from time to
// time, because a watch may be deaf. Its own key is watched from the first keepalive on: before, the lease is young.
// The keepalive that was sent with the request is its first; there is none if the lease was fresh.
func (b *Backend) wait(ctx context.Context, g *grant, p place, beat *beat) error {
	watching, cancel := context.WithCancel(ctx)
	w := &watcher{backend: b, moved: make(chan struct{}, 1)}
	defer w.end(cancel)
	w.follow(watching, p)
	if p.deep {
		w.signal() // to learn who holds the lock
	}
	tick := time.NewTicker(g.lease.ttl / 3)
	defer tick.Stop()
	failed := func(err error) error {
		if errors.Is(err, errPlaceLost) {
			return err
		}
		return fmt.Errorf("%w while waiting: %w", err, &p.held)
	}
	if beat == nil && time.Since(g.lease.counts()) > g.lease.ttl/6 { // the link is slow
		beat = b.pulse.begin(g.lease.id)
	}
	var unheard time.Time // since when keepalives are not answered
	if beat != nil {
		unheard = beat.asked
	}
	for beats := 1; ; {
		var answered <-chan struct{}
		if beat != nil {
			answered = beat.done
		}
		moved := false
		select {
		case <-w.moved:
			moved = true
		case <-answered:
			if beat.err == nil {
				unheard = time.Time{}
				moved = beat.ttl == 0 // the lease is gone, or a new leader has not read of it yet
			}
			beat = nil
		case <-tick.C:
			switch {
			case beat != nil && b.pulse.answeredYet(beat): // and both are ready
			case !unheard.IsZero() && time.Since(unheard) > g.lease.ttl:
				return failed(fmt.Errorf("%w: no server has answered for a TTL", errPlaceLost))
			case beat == nil && beats%checkEvery == 0: // advance sends one
			case beat == nil:
				beat = b.pulse.begin(g.lease.id)
				if unheard.IsZero() {
					unheard = beat.asked
				}
			default:
				b.pulse.again(beat)
			}
			if beats == 1 {
				w.followOwn(watching, g.sub())
			}
			moved = beats%checkEvery == 0
			beats++
		case <-ctx.Done():
			return failed(ctx.Err())
		}
		if !moved {
			continue
		}
		next, err := b.advance(ctx, g)
		if err != nil {
			return failed(err)
		}
		if next.first {
			return nil
		}
		next.held = locker.HeldError{Key: p.held.Key, Holder: next.held.Holder}
		w.follow(watching, next)
		p = next
	}
}

// advance makes a waiter the holder if it is the first of the queue, and tells where it stands otherwise. It answers
// errPlaceLost if its key is gone: such a request never holds the lock.
func (b *Backend) advance(ctx context.Context, g *grant) (place, error) {
	queue, sub := b.layout.queue(g.key), g.sub()
	beat := b.pulse.begin(g.lease.id)
	value := entry{ID: g.id, Holder: g.label, Locker: b.name, Since: time.Now().UnixMilli()}
	resp, err := ask(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return b.client.Txn(ctx).
			If(clientv3.Compare(clientv3.CreateRevision(sub), "=", g.revision),
				clientv3.Compare(clientv3.CreateRevision(queue), ">", g.revision-1).WithPrefix()).
			Then(clientv3.OpPut(sub, value.String(), clientv3.WithLease(g.lease.id))).
			Else(
				clientv3.OpGet(sub, clientv3.WithKeysOnly()),
				clientv3.OpGet(queue, clientv3.WithPrefix(), clientv3.WithLimit(1), clientv3.WithKeysOnly(),
					clientv3.WithMaxCreateRev(g.revision-1), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortDescend)),
				clientv3.OpGet(queue, clientv3.WithFirstCreate()...)).
			Commit()
	})
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return place{}, errPlaceLost
	}
	if err != nil {
		return place{}, err
	}
	if resp.Succeeded {
		return place{first: true}, b.settle(ctx, g, beat, resp.Header.RaftTerm)
	}
	own := resp.Responses[0].GetResponseRange().Kvs
	if len(own) == 0 || own[0].CreateRevision != g.revision {
		return place{}, errPlaceLost
	}
	p := place{seen: resp.Header.Revision}
	if before := resp.Responses[1].GetResponseRange().Kvs; len(before) > 0 {
		p.before = string(before[0].Key)
	}
	if front := resp.Responses[2].GetResponseRange().Kvs; len(front) > 0 {
		p.held.Holder = readEntry(front[0].Value).Holder
	}
	return p, nil
}

// watcher tells a waiter that the request before it, or its own, has gone.
type watcher struct {
	backend *Backend
	moved   chan struct{} // has room for one
	before  string        // the key of the request before
	leave   func()        // ends the watch on it
	deaf    atomic.Bool   // that watch has ended before its time
	work    sync.WaitGroup
}

// follow watches the request before.
func (w *watcher) follow(ctx context.Context, p place) {
	if w.before == p.before && !w.deaf.Load() {
		return
	}
	w.unfollow()
	ctx, cancel := context.WithCancel(ctx)
	w.before = p.before
	w.deaf.Store(false)
	w.backend.relay.add(w.before, w)
	w.leave = func() {
		cancel()
		w.backend.relay.remove(p.before, w)
	}
	w.work.Go(func() {
		if w.listen(ctx, p.before, p.seen) {
			return
		}
		pause := time.NewTimer(rewatchPause)
		defer pause.Stop()
		select {
		case <-pause.C:
			w.deaf.Store(true)
			w.signal()
		case <-ctx.Done():
		}
	})
}

// followOwn watches the waiter's own key. What such a watch misses is found by keepalives.
func (w *watcher) followOwn(ctx context.Context, key string) {
	w.work.Go(func() { w.listen(ctx, key, math.MaxInt64) })
}

// listen waits for the end of a key that was there in the revision seen, and is false if it can hear no more. The watch
// begins where the server stands: one that begins at a revision which the server has passed, if only by a write elsewhere,
// joins a group that is served every 100 ms. If the server has passed it, the waiter looks whether it has missed anything.
func (w *watcher) listen(ctx context.Context, key string, seen int64) (heard bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events := w.backend.client.Watch(clientv3.WithRequireLeader(ctx), key, clientv3.WithCreatedNotify(), clientv3.WithFilterPut())
	for resp := range events {
		if resp.Err() != nil { // the member has lost its leader, or has forgotten what was to be told after a new connection
			return false
		}
		if len(resp.Events) > 0 || resp.Created && resp.Header.Revision > seen {
			w.signal()
		}
		if len(resp.Events) > 0 {
			return true
		}
	}
	return false
}

func (w *watcher) signal() {
	select {
	case w.moved <- struct{}{}:
	default:
	}
}

func (w *watcher) unfollow() {
	if w.leave != nil {
		w.leave()
	}
}

func (w *watcher) end(cancel context.CancelFunc) {
	w.unfollow()
	cancel()
	w.work.Wait()
}

// relay tells waiters of this process that the request before them was released by this process too, without the way
// over the server.
type relay struct {
	mu      sync.Mutex
	waiters map[string]*watcher // by the key of the request before them
}

func (r *relay) add(before string, w *watcher) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiters == nil {
		r.waiters = make(map[string]*watcher)
	}
	r.waiters[before] = w
}

func (r *relay) remove(before string, w *watcher) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiters[before] == w {
		delete(r.waiters, before)
	}
}

// gone is called when the request of a key was released or withdrawn.
func (r *relay) gone(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.waiters[key]; w != nil {
		w.signal()
	}
}
