package conformance

import (
	"context"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// Wrap puts the Network between a program and a backend that has no network of its own: each Acquire, Extend and
// Release is one request and one reply. A call whose ctx ends while its request is held returns; the request lands
// later, and then as a single attempt. A waiter that is cut off goes on waiting at the server.
//
// Inspect, List and Break reach the backend past all faults, by Unwrap.
func (n *Network) Wrap(l locker.Locker) locker.Locker { return &wrapped{Locker: l, net: n} }

type wrapped struct {
	locker.Locker
	net    *Network
	closed bool // while the link was down; belongs to net.mu
}

// Unwrap is the backend.
func (w *wrapped) Unwrap() locker.Locker { return w.Locker }

func (w *wrapped) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if lost := req.Lost; lost != nil {
		req.Lost = func(r locker.Reason) { w.net.notify(func() { lost(r) }) }
	}
	return w.call(ctx, "acquire", req.Key, req.ID, func(ctx context.Context, late bool) (locker.Lease, error) {
		req.NoWait = req.NoWait || late
		return w.Locker.Acquire(ctx, req)
	})
}

func (w *wrapped) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	return w.call(ctx, "extend", lease.Key, lease.ID, func(ctx context.Context, _ bool) (locker.Lease, error) {
		return w.Locker.Extend(ctx, lease)
	})
}

func (w *wrapped) Release(ctx context.Context, lease locker.Lease) error {
	_, err := w.call(ctx, "release", lease.Key, lease.ID, func(ctx context.Context, _ bool) (locker.Lease, error) {
		return locker.Lease{}, w.Locker.Release(ctx, lease)
	})
	return err
}

// Close closes the backend, by which its waits end; while the link is down it ends the calls at this side, and leaves
// the rest to the Network's Close.
func (w *wrapped) Close() error {
	n := w.net
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case w.closed:
		return nil
	case n.passes(&flight{up: true}) && n.passes(&flight{}):
		n.mu.Unlock()
		defer n.mu.Lock()
		return w.Locker.Close()
	}
	w.closed = true
	n.late = append(n.late, w.Locker.Close)
	n.wakeAll()
	return nil
}

// call is one request of a wrapped Locker and its reply.
type call struct {
	net *Network
	ctx *crossed
	act func(ctx context.Context, late bool) (locker.Lease, error)

	// Everything below belongs to net.mu.
	changed   *sync.Cond // what the caller and serve wait for
	flight    flight
	arrived   bool  // at the server
	done      bool  // the reply has come back
	abandoned bool  // its caller has given up
	landing   bool  // Land let it through, and the server has not answered
	broken    error // the link was reset

	lease locker.Lease
	err   error
}

// call sends a request over the link and waits for the reply, as long as ctx lets it.
func (w *wrapped) call(
	ctx context.Context, op, key, id string, act func(context.Context, bool) (locker.Lease, error),
) (locker.Lease, error) {
	if ctx.Err() != nil {
		return act(ctx, false) // the backend sends nothing for it, and answers as it likes
	}
	n := w.net
	n.mu.Lock()
	defer n.mu.Unlock()
	fail := func(err error) (locker.Lease, error) {
		return locker.Lease{}, &locker.Error{Op: op, Key: key, Backend: w.Capabilities().Backend, Err: err}
	}
	if n.closed || w.closed {
		return fail(locker.ErrClosed)
	}
	n.countRequest([]byte(key), []byte(id))
	c := n.newCall(ctx, true)
	c.act = act
	defer context.AfterFunc(ctx, n.waker(c.changed))()
	n.started.Go(c.serve)
	for {
		switch {
		case c.done:
			return c.lease, c.err
		case c.broken != nil:
			return fail(c.broken)
		case w.closed:
			c.abandoned = true
			return fail(locker.ErrClosed)
		case ctx.Err() != nil:
			if n.idle() {
				c.ctx.end(ctx.Err()) // and the backend's own answer is at hand
				break
			}
			if c.arrived && n.passes(&flight{up: true}) {
				c.ctx.end(ctx.Err())
			}
			c.abandoned = true
			return fail(ctx.Err())
		}
		n.wait(c.changed)
	}
}

// newCall begins a call, with its flight to the server or from it.
func (n *Network) newCall(ctx context.Context, up bool) *call {
	c := &call{net: n, ctx: newCrossed(ctx), changed: sync.NewCond(&n.mu)}
	c.flight = n.takeOff("", up, c.changed)
	n.calls[c] = true
	return c
}

// land lets through a request that is held now.
func (c *call) land() {
	if !c.arrived {
		c.flight.landed, c.landing = true, true
		c.changed.Broadcast()
	}
}

// idle is true without faults.
func (n *Network) idle() bool {
	return n.faults.up == 0 && n.faults.down == 0 && n.passes(&flight{up: true})
}

// serve carries the request to the backend and the reply back.
func (c *call) serve() {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() {
		delete(n.calls, c)
		c.changed.Broadcast()
	}()
	sent := time.Now()
	if !c.arrives() {
		return
	}
	c.arrived = true
	way := time.Since(sent)
	late, swallow := c.abandoned, n.swallow

	n.mu.Unlock()
	lease, err := c.act(c.ctx, late)
	n.mu.Lock()

	if err == nil {
		// The backend has counted from the arrival of the request; the program knows only when it sent it.
		lease.Start = lease.Start.Add(-way)
	}
	c.landing = false
	n.stats.Replies++
	if n.swallows(swallow) {
		return
	}
	c.changed.Broadcast() // Land waits no longer
	c.flight = n.takeOff("", false, c.changed)
	if !c.arrives() {
		return
	}
	n.stats.BytesDown += int64(len(lease.Key) + len(lease.ID))
	c.lease, c.err, c.done = lease, err, true
}

// arrives waits for the end of the flight. It is false if the link breaks before.
func (c *call) arrives() bool {
	for {
		switch {
		case c.broken != nil:
			return false
		case c.net.arrives(&c.flight):
			return true
		}
		c.net.wait(c.changed)
	}
}

// reset ends the call, at the server too.
func (c *call) reset(why error) {
	if c.broken == nil && !c.done {
		c.broken = why
		c.landing = false
		c.ctx.end(context.Canceled)
		c.changed.Broadcast()
	}
}

// notify carries a message of the server to the client, and drops it when the link breaks first. It does not block.
func (n *Network) notify(deliver func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	c := n.newCall(context.Background(), false)
	c.arrived = true
	n.started.Go(func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		arrived := c.arrives()
		delete(n.calls, c)
		if arrived {
			n.mu.Unlock()
			deliver()
			n.mu.Lock()
		}
	})
}

// crossed is a caller's ctx as the server sees it: it ends when the news has crossed the link.
type crossed struct {
	context.Context // the caller's values

	once sync.Once
	done chan struct{}
	err  error
}

func newCrossed(ctx context.Context) *crossed {
	return &crossed{Context: context.WithoutCancel(ctx), done: make(chan struct{})}
}

func (c *crossed) end(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.done)
	})
}

// Done is closed when the server knows of the end.
func (c *crossed) Done() <-chan struct{} { return c.done }

// Err is the caller's error once the server knows of it.
func (c *crossed) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}
