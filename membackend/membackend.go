// Package membackend keeps locks in this process's memory. It is the reference implementation of the contract in
// [locker.Locker], small enough to be read as its explanation, and a test double for programs that use locks: it works
// inside testing/synctest bubbles, [Store.Expire] takes a lock away, and [Store.Holdings] tells who holds what.
//
// A [Store] stands for the server and a [Backend] for one client's connection to it. Several Backends of one Store
// exclude each other like several processes.
package membackend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// remembered is how long a finished request's ID is known, so that a repeated Release is answered like the first and a
// withdrawn request that comes late is refused.
const remembered = 15 * time.Second

var errForeignLease = errors.New("the lease was not granted by this store: extend and release with the Locker that granted it")

// Store is the server: who holds which key, and who waits.
type Store struct {
	mu        sync.Mutex
	lastToken uint64 // of all keys, so that a key without holder needs no memory
	keys      map[string]*key
	finished  map[string]struct{} // request IDs that were released or withdrawn
	forget    []finished          // the same, oldest first
}

// A key is in Store.keys while it is held; when it is free, nobody waits for it.
type key struct {
	holder  *grant
	waiting []*waiter // first come, first served
}

type grant struct {
	store  *Store
	lease  locker.Lease
	since  time.Time
	until  time.Time
	expiry *time.Timer
	lost   func(locker.Reason)
}

type waiter struct {
	req     locker.Request
	granted chan locker.Lease // has room for the one grant
}

type finished struct {
	id string
	at time.Time
}

// NewStore makes a store without locks.
func NewStore() *Store {
	return &Store{keys: make(map[string]*key), finished: make(map[string]struct{})}
}

// enter grants the key to req if it is free, else queues req. An ID is granted and queued once, however often it asks.
func (s *Store) enter(req locker.Request) (lease locker.Lease, queued *waiter, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.live(req.Key)
	switch {
	case s.isFinished(req.ID):
		return lease, nil, errors.New("this request was withdrawn")
	case k == nil:
		return s.grant(req), nil, nil
	case k.holder.lease.ID == req.ID:
		return k.holder.lease, nil, nil
	case req.NoWait:
		return lease, nil, k.holder.heldError()
	}
	for _, w := range k.waiting {
		if w.req.ID == req.ID {
			return lease, w, nil
		}
	}
	w := &waiter{req: req, granted: make(chan locker.Lease, 1)}
	k.waiting = append(k.waiting, w)
	return lease, w, nil
}

// grant makes req the holder of its key, which is free. The lease's Start is read before the timer that ends it is set.
func (s *Store) grant(req locker.Request) locker.Lease {
	s.lastToken++
	now := time.Now()
	g := &grant{store: s, since: now, until: now.Add(req.TTL), lost: req.Lost}
	g.lease = locker.Lease{Key: req.Key, ID: req.ID, Holder: req.Holder, Token: s.lastToken, TTL: req.TTL, Start: now, State: g}
	g.expiry = time.AfterFunc(req.TTL, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.live(req.Key)
	})
	k := s.keys[req.Key]
	if k == nil {
		k = new(key)
		s.keys[req.Key] = k
	}
	k.holder = g
	return g.lease
}

// live returns the state of a key that is held, after passing it on if its holder's time is over.
func (s *Store) live(name string) *key {
	for k := s.keys[name]; k != nil; k = s.keys[name] {
		if time.Now().Before(k.holder.until) {
			return k
		}
		s.free(name, k)
	}
	return nil
}

// free ends the holder's grant, and grants the key to the first that waits.
func (s *Store) free(name string, k *key) {
	k.holder.expiry.Stop()
	if len(k.waiting) == 0 {
		delete(s.keys, name)
		return
	}
	next := k.waiting[0]
	k.waiting = k.waiting[1:]
	next.granted <- s.grant(next.req)
}

func (s *Store) extend(lease locker.Lease) (locker.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.live(lease.Key)
	if k == nil || k.holder.lease.ID != lease.ID {
		return lease, locker.ErrLost
	}
	g := k.holder
	g.lease.Start, g.lease.TTL = time.Now(), lease.TTL
	g.until = g.lease.Start.Add(lease.TTL)
	g.expiry.Reset(lease.TTL)
	return g.lease, nil
}

// release frees the key if this very request holds it, and takes the request out of the queue if it waits.
func (s *Store) release(lease locker.Lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	cleanUp := lease.Token == 0
	if k := s.live(lease.Key); k != nil {
		if k.holder.lease.ID == lease.ID {
			s.finish(lease.ID)
			s.free(lease.Key, k)
			return nil
		}
		k.waiting = slices.DeleteFunc(k.waiting, func(w *waiter) bool { return w.req.ID == lease.ID })
	}
	switch {
	case cleanUp:
		s.finish(lease.ID)
		return nil
	case s.isFinished(lease.ID):
		return nil
	}
	return locker.ErrLost
}

func (s *Store) finish(id string) {
	if !s.isFinished(id) {
		s.finished[id] = struct{}{}
		s.forget = append(s.forget, finished{id, time.Now()})
	}
}

func (s *Store) isFinished(id string) bool {
	for len(s.forget) > 0 && time.Since(s.forget[0].at) > remembered {
		delete(s.finished, s.forget[0].id)
		s.forget = s.forget[1:]
	}
	_, ok := s.finished[id]
	return ok
}

// evict takes key away from the grant that holds it, or from the one with token if that is not zero. The holder is told at once.
func (s *Store) evict(name string, token uint64) bool {
	s.mu.Lock()
	k := s.live(name)
	if k == nil || token != 0 && k.holder.lease.Token != token {
		s.mu.Unlock()
		return false
	}
	lost := k.holder.lost
	s.free(name, k)
	s.mu.Unlock()
	if lost != nil {
		lost(locker.ReasonTaken)
	}
	return true
}

// Expire takes a key away from whoever holds it, as an operator or a server without memory would, and tells whether it was held.
func (s *Store) Expire(key string) bool { return s.evict(key, 0) }

// Holdings tells who holds what, sorted by key.
func (s *Store) Holdings() []locker.Holding {
	s.mu.Lock()
	defer s.mu.Unlock()
	holdings := make([]locker.Holding, 0, len(s.keys))
	for name := range s.keys {
		if h := s.holding(name); h.Token != 0 {
			holdings = append(holdings, h)
		}
	}
	slices.SortFunc(holdings, func(a, b locker.Holding) int { return cmp.Compare(a.Key, b.Key) })
	return holdings
}

func (s *Store) holding(name string) locker.Holding {
	k := s.live(name)
	if k == nil {
		return locker.Holding{Key: name}
	}
	g := k.holder
	return locker.Holding{
		Key: name, ID: g.lease.ID, Holder: g.lease.Holder, Token: g.lease.Token,
		Since: g.since, Remaining: time.Until(g.until), Waiters: len(k.waiting),
	}
}

func (g *grant) heldError() error {
	return &locker.HeldError{Key: g.lease.Key, Holder: g.lease.Holder, Remaining: time.Until(g.until)}
}

// Locker makes one more client of the store.
func (s *Store) Locker() *Backend { return &Backend{store: s, closed: make(chan struct{})} }

// Backend is one client of a Store.
type Backend struct {
	store  *Store
	close  sync.Once
	closed chan struct{}
}

var (
	_ locker.Locker    = (*Backend)(nil)
	_ locker.Inspector = (*Backend)(nil)
	_ locker.Lister    = (*Backend)(nil)
	_ locker.Breaker   = (*Backend)(nil)
)

// New makes a client of a store of its own.
func New() *Backend { return NewStore().Locker() }

// Store returns the store of which b is a client.
func (b *Backend) Store() *Store { return b.store }

// Acquire implements locker.Locker.
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := cmp.Or(req.Validate(), b.ready(ctx)); err != nil {
		return locker.Lease{}, failed("acquire", req.Key, err)
	}
	lease, queued, err := b.store.enter(req)
	if err != nil || queued == nil {
		return lease, failed("acquire", req.Key, err)
	}
	select {
	case lease = <-queued.granted:
		return lease, nil
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), locker.ErrHeld)
	case <-b.closed:
		err = locker.ErrClosed
	}
	// The grant may have come at the same moment: withdrawing undoes it.
	return locker.Lease{}, failed("acquire", req.Key, cmp.Or(b.store.release(locker.Lease{Key: req.Key, ID: req.ID}), err))
}

// Extend implements locker.Locker.
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	if err := cmp.Or(b.ready(ctx), b.own(lease)); err != nil {
		return lease, failed("extend", lease.Key, err)
	}
	if lease.TTL < locker.MinTTL || lease.TTL > locker.MaxTTL {
		return lease, failed("extend", lease.Key, fmt.Errorf("a TTL of %v is not between %v and %v", lease.TTL, locker.MinTTL, locker.MaxTTL))
	}
	fresh, err := b.store.extend(lease)
	return fresh, failed("extend", lease.Key, err)
}

// Release implements locker.Locker.
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	if err := cmp.Or(b.ready(ctx), b.own(lease)); err != nil {
		return failed("release", lease.Key, err)
	}
	return failed("release", lease.Key, b.store.release(lease))
}

// Inspect implements locker.Inspector.
func (b *Backend) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	if err := b.ready(ctx); err != nil {
		return locker.Holding{}, failed("inspect", key, err)
	}
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	return b.store.holding(key), nil
}

// List implements locker.Lister.
func (b *Backend) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		if err := b.ready(ctx); err != nil {
			yield(locker.Holding{}, failed("list", "", err))
			return
		}
		for _, h := range b.store.Holdings() {
			if !yield(h, nil) {
				return
			}
		}
	}
}

// Break implements locker.Breaker.
func (b *Backend) Break(ctx context.Context, held locker.Holding) error {
	if err := b.ready(ctx); err != nil {
		return failed("break", held.Key, err)
	}
	if held.Token == 0 || !b.store.evict(held.Key, held.Token) {
		return failed("break", held.Key, locker.ErrLost)
	}
	return nil
}

// Capabilities implements locker.Locker.
func (b *Backend) Capabilities() locker.Capabilities {
	return locker.Capabilities{
		Backend: "memory", MinTTL: locker.MinTTL, Granularity: 1,
		Fair: true, Notifies: true, ReportsLoss: true, Labels: true,
		Fencing: locker.FencingVolatile,
	}
}

// Close implements locker.Locker.
func (b *Backend) Close() error {
	b.close.Do(func() { close(b.closed) })
	return nil
}

func (b *Backend) ready(ctx context.Context) error {
	select {
	case <-b.closed:
		return locker.ErrClosed
	default:
		return ctx.Err()
	}
}

// own refuses a lease of another backend or store. A clean-up has no state.
func (b *Backend) own(lease locker.Lease) error {
	if lease.State == nil && lease.Token == 0 {
		return nil
	}
	if g, ok := lease.State.(*grant); !ok || g.store != b.store {
		return errForeignLease
	}
	return nil
}

// failed wraps err for its caller; ErrHeld and ErrLost are answers, not failures.
func failed(op, key string, err error) error {
	if err == nil || err == locker.ErrLost || errors.As(err, new(*locker.HeldError)) { //nolint:errorlint // only the bare answer
		return err
	}
	return &locker.Error{Op: op, Key: key, Backend: "memory", Err: err}
}
