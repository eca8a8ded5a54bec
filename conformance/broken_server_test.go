package conformance

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

var errKilled = errors.New("connection reset: the server was killed")

// mortal is a server that can be killed. It comes back without its locks; but the last token it has written down,
// unless it forgets that too.
type mortal struct {
	forgets bool

	mu     sync.Mutex
	life   *life
	last   uint64        // token
	paused chan struct{} // nil unless it stands still; closed when it goes on
}

// life is the time between two restarts.
type life struct {
	store *membackend.Store
	base  uint64 // is added to the store's tokens
	ctx   context.Context
	end   context.CancelFunc
}

func newMortal(forgets bool) *mortal {
	m := &mortal{forgets: forgets}
	m.begin()
	return m
}

func (m *mortal) begin() {
	m.life = &life{store: membackend.NewStore(), base: m.last}
	m.life.ctx, m.life.end = context.WithCancel(context.Background())
}

func (m *mortal) restart(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.life.end()
	if m.forgets {
		m.last = 0
	}
	m.begin()
	return nil
}

func (m *mortal) pause(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.paused = make(chan struct{})
	return nil
}

func (m *mortal) resume(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.paused)
	m.paused = nil
	return nil
}

// stands waits while the server stands still.
func (m *mortal) stands(ctx context.Context) error {
	m.mu.Lock()
	paused := m.paused
	m.mu.Unlock()
	if paused == nil {
		return nil
	}
	select {
	case <-paused:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leftovers are the locks that are held; those that are held for a day count as immortal.
func (m *mortal) leftovers(context.Context) (all, immortal []string, err error) {
	for _, holding := range m.store().Holdings() {
		all = append(all, holding.Key)
		if holding.Remaining > 24*time.Hour {
			immortal = append(immortal, holding.Key)
		}
	}
	return all, immortal, nil
}

func (m *mortal) now() *life {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.life
}

func (m *mortal) store() *membackend.Store { return m.now().store }

// connect makes one more client.
func (m *mortal) connect() locker.Locker {
	c := &connection{server: m}
	c.ctx, c.close = context.WithCancelCause(context.Background())
	return c
}

// connection is one client of a mortal server.
type connection struct {
	server *mortal
	ctx    context.Context
	close  context.CancelCauseFunc
}

// call makes one request in the server's present life, whose end is the request's.
func (c *connection) call(ctx context.Context, request func(context.Context, *life, locker.Locker) error) error {
	now := c.server.now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(now.ctx, func() { cancel(errKilled) })()
	defer context.AfterFunc(c.ctx, func() { cancel(locker.ErrClosed) })()
	if c.ctx.Err() != nil {
		return locker.ErrClosed
	}
	err := c.server.stands(ctx)
	if err == nil {
		err = request(ctx, now, now.store.Locker())
	} else {
		err = &locker.Error{Backend: "mortal", Op: "call", Err: err}
	}
	if cause := context.Cause(ctx); err != nil && (errors.Is(cause, errKilled) || errors.Is(cause, locker.ErrClosed)) {
		return &locker.Error{Backend: "mortal", Op: "call", Err: cause}
	}
	return err
}

// grantOf is the State of a lease.
type grantOf struct {
	life  *life
	state any // the store's own
}

func (c *connection) Acquire(ctx context.Context, req locker.Request) (lease locker.Lease, err error) {
	err = c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) (err error) {
		if lease, err = l.Acquire(ctx, req); err == nil {
			lease.Token += now.base
			lease.State = grantOf{now, lease.State}
			c.server.granted(lease.Token)
		}
		return err
	})
	return lease, err
}

func (m *mortal) granted(token uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = max(m.last, token)
}

func (c *connection) Extend(ctx context.Context, lease locker.Lease) (fresh locker.Lease, err error) {
	err = c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) (err error) {
		g := lease.State.(grantOf)
		if g.life != now {
			return locker.ErrLost
		}
		fresh = lease
		fresh.State = g.state
		fresh, err = l.Extend(ctx, fresh)
		fresh.Token, fresh.State = lease.Token, g
		return err
	})
	return fresh, err
}

func (c *connection) Release(ctx context.Context, lease locker.Lease) error {
	return c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) error {
		if g, ok := lease.State.(grantOf); ok {
			if g.life != now {
				return locker.ErrLost
			}
			lease.State = g.state
		}
		return l.Release(ctx, lease)
	})
}

func (c *connection) Inspect(ctx context.Context, key string) (holding locker.Holding, err error) {
	err = c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) (err error) {
		holding, err = l.(locker.Inspector).Inspect(ctx, key)
		if holding.Token != 0 {
			holding.Token += now.base
		}
		return err
	})
	return holding, err
}

func (c *connection) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		err := c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) error {
			for holding, err := range l.(locker.Lister).List(ctx) {
				if err != nil {
					return err
				}
				holding.Token += now.base
				if !yield(holding, nil) {
					return nil
				}
			}
			return nil
		})
		if err != nil {
			yield(locker.Holding{}, err)
		}
	}
}

func (c *connection) Break(ctx context.Context, held locker.Holding) error {
	return c.call(ctx, func(ctx context.Context, now *life, l locker.Locker) error {
		if held.Token <= now.base {
			return locker.ErrLost
		}
		held.Token -= now.base
		return l.(locker.Breaker).Break(ctx, held)
	})
}

func (c *connection) Capabilities() locker.Capabilities {
	caps := c.server.store().Locker().Capabilities()
	caps.Backend = "mortal"
	caps.EarlyFree = locker.EarlyFreeRestart
	caps.Fencing = locker.FencingCrash
	return caps
}

func (c *connection) Close() error {
	c.close(locker.ErrClosed)
	return nil
}
