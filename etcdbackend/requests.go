package etcdbackend

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// tombstoneLife is how long a request that is over is remembered, so that it is not granted when it is made again.
const tombstoneLife = 15 * time.Second

var errWithdrawn = errors.New("the request was released or withdrawn before: ask again with a new ID")

// grant is a request that asks, waits or holds. It is the State of its lease.
type grant struct {
	backend *Backend
	key     string // of the lock
	id      string
	label   string
	lost    func(locker.Reason) // may be nil

	turn chan struct{} // holds one token: calls that change what follows take turns
	// What follows belongs to whose turn it is; while the lock is held, lease and revision do not change.
	lease    *serverLease
	revision int64 // in which the key was created: the token; zero if the server has not said so
	unsure   bool  // a request that makes the key may be on its way, and has not been answered
	held     bool
	over     bool // released, withdrawn or gone
	gone     bool // when it was released it was not held any more

	puts    atomic.Int32 // requests sent to make the key
	deletes atomic.Int32 // requests sent to delete the key

	mu    sync.Mutex
	ended bool   // broken, or over: there is nothing to extend
	stop  func() // ends an Acquire that is under way
}

// sub is the request's key at the server.
func (g *grant) sub() string { return g.backend.layout.request(g.key, g.lease.id) }

// take waits for the turn.
func (g *grant) take(ctx context.Context) error {
	select {
	case <-g.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *grant) pass() { g.turn <- struct{}{} }

func (g *grant) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
}

func (g *grant) hasEnded() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ended
}

// requests are those that are known by their ID.
type requests struct {
	mu    sync.Mutex
	live  map[string]*grant
	swept int // how many were left by the last sweep
	over  map[string]struct{}
	times []ended // of those that are over, the oldest first
}

type ended struct {
	id string
	at time.Time
}

func newRequests() *requests {
	return &requests{live: make(map[string]*grant), over: make(map[string]struct{})}
}

// open finds the grant of a request, or makes one.
func (r *requests) open(b *Backend, req locker.Request) (*grant, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.isOver(req.ID) {
		return nil, errWithdrawn
	}
	if g := r.live[req.ID]; g != nil {
		if g.key != req.Key {
			return nil, errors.New("another request has this ID: each needs one of its own")
		}
		return g, nil
	}
	r.sweep()
	g := &grant{backend: b, key: req.Key, id: req.ID, label: req.Holder, lost: req.Lost, turn: make(chan struct{}, 1)}
	g.pass()
	r.live[req.ID] = g
	return g, nil
}

func (r *requests) find(id string) *grant {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[id]
}

// forget drops a request of which nothing is at the server. It may be made again.
func (r *requests) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, id)
}

// finish drops a request for good.
func (r *requests) finish(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, id)
	if !r.isOver(id) {
		r.over[id] = struct{}{}
		r.times = append(r.times, ended{id, time.Now()})
	}
}

func (r *requests) isOver(id string) bool {
	for len(r.times) > 0 && time.Since(r.times[0].at) > tombstoneLife {
		delete(r.over, r.times[0].id)
		r.times = r.times[1:]
	}
	_, over := r.over[id]
	return over
}

// sweep drops what nobody has released although its time is over, whenever there may be as much of it as of the rest.
func (r *requests) sweep() {
	const least = 1000
	if len(r.live) < 2*r.swept+least {
		return
	}
	for id, g := range r.live {
		select {
		case <-g.turn:
			if l := g.lease; l == nil || time.Since(l.counts()) > l.ttl+tombstoneLife {
				delete(r.live, id)
			}
			g.pass()
		default: // busy
		}
	}
	r.swept = len(r.live)
}
