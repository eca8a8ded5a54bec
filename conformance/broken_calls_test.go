package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// releasesNowAndThen does not free every 20th lock.
func releasesNowAndThen(f *faulty) {
	var releases atomic.Int64
	f.release = func(ctx context.Context, lease locker.Lease) error {
		if releases.Add(1)%20 == 0 {
			return nil
		}
		return f.Locker.Release(ctx, lease)
	}
}

func deadlineEndsHold(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if deadline, ok := ctx.Deadline(); ok && err == nil {
			time.AfterFunc(time.Until(deadline), func() { _ = f.Locker.Release(context.Background(), lease) })
		}
		return lease, err
	}
}

// ctxEndsAll closes the connection of a call whose ctx ends, with all the locks that live on it.
func ctxEndsAll(f *faulty) {
	mine := new(leases)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if err == nil {
			mine.put(lease.ID, lease)
		}
		return lease, err
	}
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		fresh, err := f.Locker.Extend(ctx, lease)
		if ctx.Err() != nil {
			for _, neighbour := range mine.all() {
				_ = f.Locker.Release(context.WithoutCancel(ctx), neighbour)
			}
		}
		return fresh, err
	}
}

func slowToGiveUp(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if ctx.Err() != nil {
			sometimes(context.WithoutCancel(ctx), time.Second, time.Second+time.Millisecond)
		}
		return lease, err
	}
}

func forgetsHeld(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if ctx.Err() != nil && err != nil {
			err = &locker.Error{Op: "acquire", Key: req.Key, Err: ctx.Err()}
		}
		return lease, err
	}
}

func silenceIsHeld(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if ctx.Err() != nil && req.NoWait {
			err = &locker.HeldError{Key: req.Key}
		}
		return lease, err
	}
}

// sendsAnyway looks at its ctx only after it has sent.
func sendsAnyway(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		if ctx.Err() == nil {
			return f.Locker.Acquire(ctx, req)
		}
		req.NoWait = true
		lease, err := f.Locker.Acquire(context.WithoutCancel(ctx), req)
		return lease, errors.Join(ctx.Err(), err)
	}
}

// asksNobody takes a lock that it holds for one that it keeps.
func asksNobody(f *faulty) {
	f.extend = func(_ context.Context, lease locker.Lease) (locker.Lease, error) {
		lease.Start = time.Now()
		return lease, nil
	}
}

// neverWell gives up its connection after the first call that was not answered, and makes no other.
func neverWell(f *faulty) {
	var gone atomic.Bool
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		if gone.Load() {
			return lease, &locker.Error{Op: "extend", Key: lease.Key, Err: errKilled}
		}
		fresh, err := f.Locker.Extend(ctx, lease)
		if ctx.Err() != nil {
			gone.Store(true)
		}
		return fresh, err
	}
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		if gone.Load() {
			return locker.Lease{}, &locker.Error{Op: "acquire", Key: req.Key, Err: errKilled}
		}
		return f.Locker.Acquire(ctx, req)
	}
}

func alwaysYes(f *faulty) {
	f.release = func(ctx context.Context, lease locker.Lease) error {
		_ = f.Locker.Release(ctx, lease)
		return nil
	}
}

// oneIsNotGivenUp takes every renewal of the 100th lock for done.
func oneIsNotGivenUp(f *faulty) {
	var grants atomic.Int64
	favourite := new(leases)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if err == nil && grants.Add(1) == 100 {
			favourite.put(lease.ID, lease)
		}
		return lease, err
	}
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		if _, ok := favourite.get(lease.ID); ok {
			lease.Start = time.Now()
			return lease, nil
		}
		return f.Locker.Extend(ctx, lease)
	}
}

func trustsForEver(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		lease.TTL *= 10
		return lease, err
	}
}

func startByWallClock(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		lease.Start = lease.Start.Round(0)
		return lease, err
	}
}

// sameTokenAfterExpiry counts the locks that were released.
func sameTokenAfterExpiry() fault {
	var mu sync.Mutex
	held := make(map[string]uint64)
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			lease, err := f.Locker.Acquire(ctx, req)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				if token, ok := held[req.Key]; ok {
					lease.Token = token
				}
				held[req.Key] = lease.Token
			}
			return lease, err
		}
		f.release = func(ctx context.Context, lease locker.Lease) error {
			mu.Lock()
			delete(held, lease.Key)
			mu.Unlock()
			return f.Locker.Release(ctx, lease)
		}
	}
}

// leavesThings notes for ever that a lock was released.
func leavesThings(f *faulty) {
	f.release = func(ctx context.Context, lease locker.Lease) error {
		note := locker.Request{Key: lease.Key + "/note", ID: rand.Text(), TTL: 48 * time.Hour, NoWait: true}
		_, _ = f.Locker.Acquire(ctx, note)
		return f.Locker.Release(ctx, lease)
	}
}
