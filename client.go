package locker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/fec20105/locker/internal/clock"
)

// Client takes locks from a [Locker] and keeps them: it queues the goroutines that want the same key, renews what is held, tells
// the work when a lock can no longer be trusted, and leaves nothing behind. It is safe for concurrent use; a
// program needs one for each server. It knows time and nothing of servers.
type Client struct {
	locker   Locker
	owned    bool // made by Open, so closed by Close
	defaults *settings
	clock    clock.Clock
	queue    queue
	ctx      context.Context // ends with ErrClosed
	cancel   context.CancelCauseFunc

	mu     sync.Mutex
	closed bool
	locks  map[*Lock]struct{} // until nothing more is to be done for them
	work   sync.WaitGroup     // calls, locks and clean-ups; added to under mu while not closed
	done   chan struct{}      // closed when Close is through
}

// New makes a Client for a Locker that the program has made, and does not close it. The options are the defaults for
// all calls.
func New(l Locker, opts ...Option) (*Client, error) {
	if l == nil {
		return nil, &Error{Op: "open", Err: errors.New("the Locker is nil")}
	}
	defaults := defaultSettings()
	s, err := with(&defaults, opts)
	if err != nil {
		return nil, &Error{Op: "open", Err: err}
	}
	c := &Client{
		locker:   l,
		defaults: s,
		clock:    clock.System(),
		locks:    make(map[*Lock]struct{}),
		done:     make(chan struct{}),
	}
	// Only this module can name the type of such a clock: its tests suspend a machine by it.
	if own, ok := As[interface{ Clock() clock.Clock }](l); ok {
		c.clock = own.Clock()
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c, nil
}

// Locker returns the Locker behind the Client, for what not every backend can: see [As].
func (c *Client) Locker() Locker { return c.locker }

// Inspect tells who holds key. Where the backend cannot tell it answers errors.ErrUnsupported.
func (c *Client) Inspect(ctx context.Context, key string) (Holding, error) {
	inspector, ok := As[Inspector](c.locker)
	if !ok {
		return Holding{}, &Error{Op: "inspect", Key: key, Backend: c.backend(), Err: errors.ErrUnsupported}
	}
	if err := c.begin(); err != nil {
		return Holding{}, &Error{Op: "inspect", Key: key, Err: err}
	}
	defer c.work.Done()
	call := within(ctx, c.ctx, 0)
	defer call.end()
	holding, err := inspector.Inspect(call, key)
	if err != nil && call.Err() != nil && context.Cause(call) == ErrClosed { //nolint:errorlint // the very cause we set
		err = &Error{Op: "inspect", Key: key, Err: ErrClosed}
	}
	return holding, err
}

// Acquire waits for the lock and holds it under a heartbeat until [Lock.Release]. The wait ends with ctx, or as WithWait and
// WithNoWait say; the lock does not: it keeps ctx's values only. Errors match [ErrHeld] where the key was found
// held, the ctx's error or context.DeadlineExceeded where the wait was over, and [ErrClosed]. After an error nothing
// stays behind on the server: what the failed request may have left there is withdrawn in the background.
//
// Most programs are better served by [Client.Do].
func (c *Client) Acquire(ctx context.Context, key string, opts ...Option) (*Lock, error) {
	s, err := with(c.defaults, opts)
	if err != nil {
		return nil, &Error{Op: "acquire", Key: key, Err: err}
	}
	return c.acquire(ctx, key, s)
}

func (c *Client) acquire(ctx context.Context, key string, s *settings) (*Lock, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, &Error{Op: "acquire", Key: key, Err: err}
	}
	req := Request{Key: key, ID: id.String(), TTL: s.ttl, NoWait: s.noWait, NoExtend: s.noHeartbeat, Holder: s.holder}
	if err := req.Validate(); err != nil {
		return nil, &Error{Op: "acquire", Key: key, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return nil, &Error{Op: "acquire", Key: key, Err: err}
	}
	if err := c.begin(); err != nil {
		return nil, &Error{Op: "acquire", Key: key, Err: err}
	}
	l, err := c.ask(ctx, req, s)
	if err != nil {
		c.work.Done()
		return nil, err
	}
	return l, nil // c.work is done when the lock is gone
}

// ask waits for the key's turn in this process and then at the server.
func (c *Client) ask(ctx context.Context, req Request, s *settings) (*Lock, error) {
	wait := within(ctx, c.ctx, s.wait)
	defer wait.end()

	turn := true
	if s.noWait {
		var holder *Lock
		if turn, holder = c.queue.try(req.Key); holder != nil && holder.Err() != nil {
			turn, holder = c.queue.try(req.Key) // nobody had noticed its end: the process was stopped, or the machine suspended
		}
		if holder != nil {
			return nil, holder.heldError()
		}
	} else if err := c.queue.take(wait, req.Key); err != nil {
		if holder := c.queue.holderOf(req.Key); holder != nil {
			err = fmt.Errorf("%w: %w", err, holder.heldError())
		}
		return nil, c.waitError(wait, req.Key, err)
	}

	l := newLock(ctx, c, s, req, turn)
	req.Lost = l.lostByBackend
	before := c.clock.Now()
	lease, err := c.locker.Acquire(wait, req)
	after := c.clock.Now()
	if err == nil && after.Parted(before) {
		// Whether the machine slept before or after Start cannot be known: count from an Extend during which it did not.
		before = after
		lease, err = c.locker.Extend(wait, lease)
		if errors.Is(err, ErrLost) {
			err = fmt.Errorf("%w: %v", errSuspended, err) //nolint:errorlint // ErrLost is no answer to an acquire
		}
		if after = c.clock.Now(); err == nil && after.Parted(before) {
			err = errSuspended
		}
	}
	if err == nil {
		err = l.grant(lease, before, after)
	}
	if err == nil {
		return l, nil
	}

	if turn {
		c.queue.pass(req.Key) // before the withdrawal, which takes long where the server cannot be reached
	}
	if asked := s.noWait && errors.Is(err, ErrHeld) && wait.Err() == nil; !asked { // only asked: nothing to withdraw
		c.work.Go(func() { c.withdraw(wait, req, s) })
	}
	return nil, c.waitError(wait, req.Key, err)
}

// waitError makes what a backend answered when the wait was over match the reason for which it was over.
func (c *Client) waitError(wait context.Context, key string, err error) error {
	over := wait.Err()
	switch {
	case over == nil:
	case context.Cause(wait) == ErrClosed: //nolint:errorlint // the very cause we set
		return &Error{Op: "acquire", Key: key, Err: ErrClosed}
	case !errors.Is(err, over):
		err = fmt.Errorf("%w: %w", over, err)
	}
	if _, ok := errors.AsType[*Error](err); ok || errors.Is(err, ErrHeld) && over == nil {
		return err
	}
	return &Error{Op: "acquire", Key: key, Err: err}
}

// withdraw undoes a request whose outcome is not known.
func (c *Client) withdraw(ctx context.Context, req Request, s *settings) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.releaseTimeout)
	defer cancel()
	if err := c.release(ctx, Lease{Key: req.Key, ID: req.ID}, s); err != nil && !errors.Is(err, ErrLost) {
		s.logger.WarnContext(ctx, "a failed acquire could not be withdrawn: its lock, if any, ends with its TTL",
			"key", req.Key, "error", err)
	}
}

// release asks until the server has answered or ctx, which has a deadline, is over. ErrLost is a loss only as the first
// answer: after a try with an unknown outcome it says that this try has released the lock.
func (c *Client) release(ctx context.Context, lease Lease, s *settings) error {
	over, _ := ctx.Deadline()
	for try := 0; ; try++ {
		call := within(ctx, nil, s.releaseTimeout/3)
		err := c.locker.Release(call, lease)
		call.end()
		switch {
		case err == nil:
			return nil
		case try > 0 && errors.Is(err, ErrLost):
			s.logger.InfoContext(ctx, "a release was answered only when repeated, and then that the lock is not held: the first try has released it",
				"key", lease.Key, "token", lease.Token)
			return nil
		case errors.Is(err, ErrLost), errors.Is(err, ErrClosed), errors.Is(err, errors.ErrUnsupported):
			return err
		}
		pause := backoff(s.releaseTimeout/500, s.releaseTimeout/8, try)
		if time.Until(over) <= pause {
			return err
		}
		timer := time.NewTimer(pause)
		<-timer.C
	}
}

// begin counts a call, so that Close waits for it.
func (c *Client) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.work.Add(1)
	return nil
}

// keep notes a granted lock, so that Close releases it.
func (c *Client) keep(l *Lock) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.locks[l] = struct{}{}
	return nil
}

// drop forgets a lock for which nothing more is to be done.
func (c *Client) drop(l *Lock) {
	c.mu.Lock()
	delete(c.locks, l)
	c.mu.Unlock()
	c.work.Done()
}

func (c *Client) backend() string { return c.locker.Capabilities().Backend }

// Close ends waits with ErrClosed, ends held locks with ReasonClosed and releases them at once, and waits for every goroutine
// and callback that the Client started: let the work end before, and do not call it from a callback. What is kept for its
// minimum hold only stays at the server until its TTL is over. It closes the Locker only if Open made it. A second Close waits for the first, and answers nil.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		<-c.done
		return nil
	}
	c.closed = true
	held := make([]*Lock, 0, len(c.locks))
	for l := range c.locks {
		held = append(held, l)
	}
	c.mu.Unlock()

	c.cancel(ErrClosed)
	for _, l := range held {
		l.close()
	}
	c.work.Wait()
	var err error
	if c.owned {
		err = c.locker.Close()
	}
	close(c.done)
	return err
}
