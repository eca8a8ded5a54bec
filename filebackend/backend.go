// Package filebackend keeps locks in a folder of this host, for the processes that run on it. It needs no server.
//
// Importing it registers the URL scheme file with [locker.Open]: file:///var/lib/myapp/locks names a folder, and file:
// alone a folder of the user's own, ~/.local/state/locker. It works on Linux; elsewhere [New] answers an error that
// matches errors.ErrUnsupported.
//
// # What is promised
//
// Each step is made under flock(2) and ends with one rename, so that a process that is killed at any instant leaves the
// state before the step or after it. The kernel gives the flock back when its holder dies. Those who wait are served in
// the order in which they came, are passed over when they have died, and are woken by a file event; where no event comes
// they look once a second, or twenty times where the system has no watches left. A lock that an operator takes away
// ([Backend.Break]) is reported at once.
//
// Time is CLOCK_BOOTTIME, which all processes of a host share, counts suspend, and knows no steps. A state is
// only good for the boot in which it was written: a reboot ends every process, so it frees every lock.
//
// Tokens come from a counter of the folder, which is written ahead in blocks, with fsync, and never gives out a number
// twice, whatever crashes. A folder that is new begins at the time of day in microseconds. So tokens grow even if the
// folder was deleted, as long as the clock is not set back.
//
// All processes must see the same folder, the same boot and the same clock. Network file systems, folders shared
// between virtual machines, and time namespaces are refused where they can be recognised.
//
// # What is in the folder
//
// The file tokens, its lock, and a folder for this boot, with sixteen lock files, one file for each lock that is held, and
// one for each process that holds or waits. What crashed processes leave there is removed a minute later by those
// that come after.
//
// A process that is stopped (SIGSTOP) within a step, which takes some ten microseconds, holds up a sixteenth of the
// folder's locks until it goes on. Calls end with their ctx all the same, and locks that cannot be renewed are lost at their
// deadline.
package filebackend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var (
	_ locker.Locker    = (*Backend)(nil)
	_ locker.Inspector = (*Backend)(nil)
	_ locker.Lister    = (*Backend)(nil)
	_ locker.Breaker   = (*Backend)(nil)
)

const (
	name = "file"
	// fallback is how often a waiter looks although nobody woke it.
	fallback = time.Second
	// unwatched is the same where file events cannot be had.
	unwatched = 50 * time.Millisecond
	// remembered is how long a finished request's ID is known, so that a repeated Release is answered like the first and a
	// withdrawn request that comes late is refused.
	remembered = 15 * time.Second
)

// Backend is a [locker.Locker] on a folder.
type Backend struct {
	folder  *folder
	mail    *mailbox
	over    finished
	sweeper sweeper

	calls  sync.RWMutex // read-locked by each call; Close waits for all
	closed chan struct{}
	shut   func() error
}

// New makes a Backend on a folder, which is made if it is missing; its parent must exist. An empty name is the user's
// own folder. All processes that give the same folder exclude each other.
func New(ctx context.Context, path string) (*Backend, error) {
	f, err := openFolder(ctx, path)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	b := &Backend{folder: f, closed: f.closed}
	b.mail = newMailbox(f, b.stillHolds)
	b.shut = sync.OnceValue(func() error {
		close(b.closed)
		b.calls.Lock()
		defer b.calls.Unlock()
		b.sweeper.work.Wait()
		return errors.Join(b.mail.close(), f.close())
	})
	return b, nil
}

// Capabilities implements [locker.Locker]. It promises no Fallback but the TTL: a waiter that was stopped is granted the
// lock like any other, and those behind it wait until that grant ends.
func (b *Backend) Capabilities() locker.Capabilities {
	return locker.Capabilities{
		Backend:     name,
		MinTTL:      locker.MinTTL,
		Expiry:      50 * time.Millisecond, // a waiter's timer, and its place in the queue
		EarlyFree:   0,                     // a reboot ends the holders too
		Fair:        true,
		Notifies:    true,
		Fencing:     locker.FencingCrash,
		ReportsLoss: true,
		Labels:      true,
	}
}

// held is what this Backend knows of a lease: the State of its Lease.
type held struct {
	backend  *Backend
	released atomic.Bool
}

// Extend implements [locker.Locker].
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	if err := b.begin(ctx); err != nil {
		return locker.Lease{}, b.fail("extend", lease.Key, err)
	}
	defer b.calls.RUnlock()
	if _, err := b.own(lease); err != nil {
		return locker.Lease{}, b.fail("extend", lease.Key, err)
	}
	if lease.TTL < locker.MinTTL || lease.TTL > locker.MaxTTL {
		return locker.Lease{}, b.fail("extend", lease.Key, fmt.Errorf("a TTL of %v is not between %v and %v", lease.TTL, locker.MinTTL, locker.MaxTTL))
	}
	err := b.folder.change(ctx, lease.Key, func(c *change) error {
		if !c.holds(lease.ID) {
			return locker.ErrLost
		}
		c.state.Holder.TTL = lease.TTL
		c.state.Holder.Until = c.now + lease.TTL
		c.dirty = true
		lease.Start = startOf(c.state.Holder)
		return nil
	})
	if err != nil {
		if err == locker.ErrLost { //nolint:errorlint // the bare answer
			b.mail.remove(lease.ID)
		}
		return locker.Lease{}, b.fail("extend", lease.Key, err)
	}
	return lease, nil
}

// Release implements [locker.Locker].
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	if err := b.begin(ctx); err != nil {
		return b.fail("release", lease.Key, err)
	}
	defer b.calls.RUnlock()
	cleanUp := lease.Token == 0 && lease.State == nil
	if !cleanUp {
		h, err := b.own(lease)
		if err != nil {
			return b.fail("release", lease.Key, err)
		}
		if h.released.Load() {
			return nil
		}
	}
	b.mail.remove(lease.ID) // before, so that the release is not reported as a loss
	err := b.folder.change(ctx, lease.Key, func(c *change) error {
		switch {
		case c.holds(lease.ID):
			c.free()
		case c.leave(lease.ID), cleanUp, b.over.has(lease.ID):
		default:
			return locker.ErrLost
		}
		return nil
	}, func() { b.over.add(lease.ID) })
	if err == nil && !cleanUp {
		lease.State.(*held).released.Store(true)
	}
	return b.fail("release", lease.Key, err)
}

// Close implements [locker.Locker].
func (b *Backend) Close() error { return b.shut() }

// begin counts a call, which ends with calls.RUnlock.
func (b *Backend) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b.calls.RLock()
	select {
	case <-b.closed:
		b.calls.RUnlock()
		return locker.ErrClosed
	default:
		return nil
	}
}

// own refuses leases that this Backend has not granted.
func (b *Backend) own(lease locker.Lease) (*held, error) {
	if h, ok := lease.State.(*held); ok && h.backend == b {
		return h, nil
	}
	return nil, errors.New("the lease was granted by another Locker: give it back to that one")
}

// fail wraps an error of a call. ErrClosed, ErrLost and a plain HeldError are answers, and stay as they are.
func (b *Backend) fail(op, key string, err error) error {
	switch {
	case err == nil, err == locker.ErrLost: //nolint:errorlint // the bare answer
		return err
	case errors.Is(err, locker.ErrClosed):
		return locker.ErrClosed
	}
	if held, ok := err.(*locker.HeldError); ok { //nolint:errorlint // the bare answer
		return held
	}
	return &locker.Error{Op: op, Key: key, Backend: name, Err: err}
}

// finished remembers the IDs of requests that were released or withdrawn. It is kept in memory: a request comes
// late only within the process that made it.
type finished struct {
	mu  sync.Mutex
	ids map[string]struct{}
	in  []ended // the same, oldest first
}

type ended struct {
	id string
	at time.Time
}

func (f *finished) add(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ids == nil {
		f.ids = make(map[string]struct{})
	}
	if _, ok := f.ids[id]; !ok {
		f.ids[id] = struct{}{}
		f.in = append(f.in, ended{id, time.Now()})
	}
	f.forget()
}

func (f *finished) has(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget()
	_, ok := f.ids[id]
	return ok
}

func (f *finished) forget() {
	for len(f.in) > 0 && time.Since(f.in[0].at) > remembered {
		delete(f.ids, f.in[0].id)
		f.in = f.in[1:]
	}
}
