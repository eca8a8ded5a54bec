package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// secondHolders grants, once in a while, a key that is held.
func secondHolders() fault {
	extra := new(leases)
	var newest atomic.Uint64
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			atOnce := req
			atOnce.NoWait = true
			lease, err := f.Locker.Acquire(ctx, atOnce)
			switch {
			case errors.Is(err, locker.ErrHeld) && mathrand.N(10) == 0:
				lease = locker.Lease{Key: req.Key, ID: req.ID, Token: newest.Add(1), TTL: req.TTL, Start: time.Now()}
				extra.put(req.ID, lease)
				return lease, nil
			case errors.Is(err, locker.ErrHeld) && !req.NoWait:
				lease, err = f.Locker.Acquire(ctx, req)
			}
			if err == nil {
				newest.Store(lease.Token)
			}
			return lease, err
		}
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			if _, ok := extra.get(lease.ID); ok {
				lease.Start = time.Now()
				return lease, nil
			}
			return f.Locker.Extend(ctx, lease)
		}
		f.release = func(ctx context.Context, lease locker.Lease) error {
			if _, ok := extra.get(lease.ID); ok {
				return nil
			}
			return f.Locker.Release(ctx, lease)
		}
	}
}

// bells wake those who wait for a key.
type bells struct {
	mu      sync.Mutex
	waiting map[string]map[chan struct{}]func() bool
}

// hang adds a bell that rings for a key if the wake-up passes the link.
func (b *bells) hang(key string, passes func() bool) (bell chan struct{}, remove func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting[key] == nil {
		b.waiting[key] = make(map[chan struct{}]func() bool)
	}
	bell = make(chan struct{}, 1)
	b.waiting[key][bell] = passes
	return bell, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.waiting[key], bell)
	}
}

func (b *bells) ring(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for bell, passes := range b.waiting[key] {
		if passes() {
			select {
			case bell <- struct{}{}:
			default: // it has been rung already
			}
		}
	}
}

// wakeUps makes Lockers that ask again when the key is released, and every so often unless that is zero.
func wakeUps(every time.Duration) func() fault {
	return func() fault {
		shared := &bells{waiting: make(map[string]map[chan struct{}]func() bool)}
		return func(f *faulty) {
			f.opaque = true
			passes := f.passes
			if passes == nil {
				passes = f.net.Gate("notify")
			}
			f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
				bell, remove := shared.hang(req.Key, passes)
				defer remove()
				return askAgain(ctx, f.Locker, req, bell, every)
			}
			f.release = func(ctx context.Context, lease locker.Lease) error {
				err := f.Locker.Release(ctx, lease)
				shared.ring(lease.Key)
				return err
			}
		}
	}
}

// deafAfterACut makes Lockers that miss all wake-ups after the first one that was lost.
func deafAfterACut(every time.Duration) func() fault {
	return func() fault {
		hears := wakeUps(every)()
		return func(f *faulty) {
			var deaf atomic.Bool
			gate := f.net.Gate("notify")
			f.passes = func() bool {
				if !gate() {
					deaf.Store(true)
				}
				return !deaf.Load()
			}
			hears(f)
		}
	}
}

// polls makes Lockers that ask again after a pause. The n-th Locker has the pause of n.
func polls(pause func(n int) time.Duration) func() fault {
	return func() fault {
		var lockers atomic.Int64
		return func(f *faulty) {
			f.opaque = true
			every := pause(int(lockers.Add(1)))
			f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
				return askAgain(ctx, f.Locker, req, nil, every)
			}
		}
	}
}

// oneStarves makes the first Locker of the row slow; the suite itself has opened one before.
func oneStarves(n int) time.Duration {
	if n == 2 {
		return 3 * time.Second
	}
	return time.Millisecond
}

// askAgain asks when the bell rings, and after each pause unless that is zero, until the answer is another than
// ErrHeld.
func askAgain(ctx context.Context, l locker.Locker, req locker.Request, bell <-chan struct{}, pause time.Duration) (locker.Lease, error) {
	atOnce := req
	atOnce.NoWait = true
	for {
		lease, err := l.Acquire(ctx, atOnce)
		if req.NoWait || !errors.Is(err, locker.ErrHeld) {
			return lease, err
		}
		again, stop := ctx, context.CancelFunc(func() {})
		if pause > 0 {
			again, stop = context.WithTimeout(ctx, pause)
		}
		select {
		case <-bell:
		case <-again.Done():
		}
		stop()
		if ctx.Err() != nil {
			return locker.Lease{}, &locker.Error{Op: "acquire", Key: req.Key, Err: errors.Join(ctx.Err(), locker.ErrHeld)}
		}
	}
}

// waitsTwice stands in the queue a second time.
func waitsTwice(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		twin, cancel := context.WithCancel(ctx)
		var waits sync.WaitGroup
		defer waits.Wait()
		defer cancel()
		if !req.NoWait {
			waits.Go(func() {
				second := locker.Request{Key: req.Key, ID: rand.Text(), TTL: req.TTL}
				if lease, err := f.Locker.Acquire(twin, second); err == nil {
					_ = f.Locker.Release(ctx, lease)
				}
			})
		}
		return f.Locker.Acquire(ctx, req)
	}
}

// fewAtOnce has four connections, and each call keeps one until it is answered.
func fewAtOnce(f *faulty) {
	pool := make(chan struct{}, 4)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		pool <- struct{}{}
		defer func() { <-pool }()
		return f.Locker.Acquire(ctx, req)
	}
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		select {
		case pool <- struct{}{}:
			defer func() { <-pool }()
			return f.Locker.Extend(ctx, lease)
		case <-ctx.Done():
			return lease, ctx.Err()
		}
	}
}
