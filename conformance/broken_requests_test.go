package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"

	"github.com/fec20105/locker"
)

// eachTryIsNew does not know a request that comes again.
func eachTryIsNew() fault {
	granted := new(leases) // by the ID that the caller knows
	inside := func(lease locker.Lease) locker.Lease {
		if known, ok := granted.get(lease.ID); ok {
			lease.ID = known.ID
		}
		return lease
	}
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			id := req.ID
			req.ID = rand.Text()
			lease, err := f.Locker.Acquire(ctx, req)
			if err == nil {
				granted.put(id, lease)
				lease.ID = id
			}
			return lease, err
		}
		f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
			fresh, err := f.Locker.Extend(ctx, inside(lease))
			fresh.ID = lease.ID
			return fresh, err
		}
		f.release = func(ctx context.Context, lease locker.Lease) error { return f.Locker.Release(ctx, inside(lease)) }
	}
}

// comesBack makes a request that the server refuses again, as another.
func comesBack(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if err == nil || errors.Is(err, locker.ErrHeld) || ctx.Err() != nil {
			return lease, err
		}
		req.ID = rand.Text()
		return f.Locker.Acquire(ctx, req)
	}
}

// closeWaitsForAnswers to renewals, however long they take.
func closeWaitsForAnswers(f *faulty) {
	var renewals sync.WaitGroup
	f.close = renewals.Wait
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		renewals.Add(1)
		defer renewals.Done()
		return f.Locker.Extend(ctx, lease)
	}
}
