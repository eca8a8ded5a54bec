package locker

import (
	"context"
	"sync"
	"time"
)

// callContext is the context of one call to the Locker: a copy of the caller's that also ends with the Client, and at the end
// of the call's time. A backend that is answered at once often does not ask for Done: then there is no need for a timer,
// nor for entries in other contexts, which would cost more than all else that a Client does for a call. So the context that has
// them is made when somebody asks.
type callContext struct {
	context.Context                 // the caller's
	client          context.Context // ends with ErrClosed; nil if the call may outlive the Client
	deadline        time.Time       // zero if it has none of its own

	mu    sync.Mutex
	full  context.Context // nil until it is made
	stop  func()          // ends it
	ended bool
}

// within returns a callContext. The time bounds the call if it is not 0. The caller calls end when the call is over.
func within(ctx, client context.Context, bound time.Duration) *callContext {
	c := &callContext{Context: ctx, client: client}
	if bound > 0 {
		c.deadline = time.Now().Add(bound)
	}
	return c
}

// end is the function that cancels the context.
func (c *callContext) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.full != nil {
		c.stop()
	}
}

// whole makes the full context if need be. It is called with mu held.
func (c *callContext) whole() context.Context {
	if c.full != nil {
		return c.full
	}
	ctx, cancel := context.WithCancelCause(c.Context)
	c.full, c.stop = ctx, func() { cancel(nil) }
	if c.client != nil {
		unhook := context.AfterFunc(c.client, func() { cancel(ErrClosed) })
		c.stop = func() {
			unhook()
			cancel(nil)
		}
		if c.client.Err() != nil {
			cancel(ErrClosed) // now, and not when that function has run
		}
	}
	if !c.deadline.IsZero() {
		stop := c.stop
		timed, release := context.WithDeadline(ctx, c.deadline)
		c.full, c.stop = timed, func() {
			release()
			stop()
		}
	}
	if c.ended {
		c.stop()
	}
	return c.full
}

// Deadline implements [context.Context].
func (c *callContext) Deadline() (time.Time, bool) {
	theirs, ok := c.Context.Deadline()
	if c.deadline.IsZero() || ok && theirs.Before(c.deadline) {
		return theirs, ok
	}
	return c.deadline, true
}

// Done implements [context.Context].
func (c *callContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.whole().Done()
}

// Err implements [context.Context].
func (c *callContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	going := !c.ended && c.Context.Err() == nil && (c.client == nil || c.client.Err() == nil) &&
		(c.deadline.IsZero() || time.Now().Before(c.deadline))
	if c.full == nil && going {
		return nil
	}
	return c.whole().Err() // which of them was first is remembered
}

// Value implements [context.Context]. The full context answers how it can be told of the end of its parents cheaply.
func (c *callContext) Value(key any) any {
	c.mu.Lock()
	full := c.full
	c.mu.Unlock()
	if full != nil {
		return full.Value(key)
	}
	return c.Context.Value(key)
}
