package main

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// broken are deliberately broken lockers: a run that finds nothing wrong with one of them proves nothing of the others. They are
// broken once in often.
var broken = map[string]func(locker.Locker) locker.Locker{
	"double":  func(l locker.Locker) locker.Locker { return double{disguised{l}} },
	"overdue": func(l locker.Locker) locker.Locker { return overdue{l} },
	"token": func(l locker.Locker) locker.Locker {
		return &token{disguised: disguised{l}, given: make(map[string]uint64)}
	},
	"kept": func(l locker.Locker) locker.Locker { return kept{l} },
}

const often = 10

func brokenNames() string { return strings.Join(slices.Sorted(maps.Keys(broken)), ", ") }

func breakIt(name string, l locker.Locker) locker.Locker {
	if name == "" {
		return l
	}
	return broken[name](l)
}

// double excludes nobody now and then: it locks another key instead.
type double struct{ disguised }

func (d double) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	asked := req.Key
	if rand.IntN(often) == 0 {
		req.Key += "/" + req.ID
	}
	real, err := d.Locker.Acquire(ctx, req)
	return disguise(real, asked, real.Token), err
}

// disguise makes a lease look like another.
func disguise(real locker.Lease, key string, token uint64) locker.Lease {
	lease := real
	lease.Key, lease.Token, lease.State = key, token, real
	return lease
}

// undisguised is the real lease. A clean-up names no lease that was disguised.
func undisguised(lease locker.Lease) locker.Lease {
	if real, ok := lease.State.(locker.Lease); ok {
		return real
	}
	return lease
}

// disguised is a Locker whose leases may be disguised.
type disguised struct{ locker.Locker }

func (d disguised) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	real, err := d.Locker.Extend(ctx, undisguised(lease))
	return disguise(real, lease.Key, lease.Token), err
}

func (d disguised) Release(ctx context.Context, lease locker.Lease) error {
	return d.Locker.Release(ctx, undisguised(lease))
}

// overdue believes past the deadline: whatever the server answers to a renewal, and whether it does, counts as a success.
type overdue struct{ locker.Locker }

func (o overdue) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, lease.TTL/4)
	defer cancel()
	fresh, err := o.Locker.Extend(ctx, lease)
	if err != nil {
		fresh, fresh.Start = lease, time.Now()
	}
	return fresh, nil
}

// token gives a token twice now and then.
type token struct {
	disguised
	mu    sync.Mutex
	given map[string]uint64 // the last of each key
}

func (t *token) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	real, err := t.Locker.Acquire(ctx, req)
	t.mu.Lock()
	defer t.mu.Unlock()
	given := t.given[req.Key]
	if err == nil && (given == 0 || rand.IntN(often) > 0) {
		given = real.Token
		t.given[req.Key] = given
	}
	return disguise(real, req.Key, given), err
}

// kept never gives a lock back now and then, and renews it for ever.
type kept struct{ locker.Locker }

func (k kept) Release(ctx context.Context, lease locker.Lease) error {
	if lease.Token == 0 || rand.IntN(often) > 0 {
		return k.Locker.Release(ctx, lease)
	}
	go func() {
		for err := error(nil); err == nil; lease, err = k.Extend(context.Background(), lease) {
			pause(context.Background(), lease.TTL/3)
		}
	}()
	return nil
}
