package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// broken are deliberately broken lockers: a run that finds nothing wrong with one of them proves nothing of the others.
var broken = map[string]func(locker.Locker) locker.Locker{
	"double":  func(l locker.Locker) locker.Locker { return &double{Locker: l} },
	"overdue": func(l locker.Locker) locker.Locker { return overdue{l} },
	"token": func(l locker.Locker) locker.Locker {
		return &stuck{Locker: l, given: make(map[string]uint64), real: make(map[string]uint64)}
	},
	"kept": func(l locker.Locker) locker.Locker { return kept{l} },
}

func brokenNames() string { return strings.Join(slices.Sorted(maps.Keys(broken)), ", ") }

func breakIt(name string, l locker.Locker) locker.Locker {
	if name == "" {
		return l
	}
	return broken[name](l)
}

// often is how many grants there are to each that is broken.
const often = 10

// double excludes nobody now and then: what it locks then is another key.
type double struct {
	locker.Locker
	others sync.Map // by ID
}

func (d *double) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	key := req.Key
	if rand.IntN(often) == 0 {
		req.Key = fmt.Sprint(key, "/", req.ID)
		d.others.Store(req.ID, req.Key)
	}
	lease, err := d.Locker.Acquire(ctx, req)
	lease.Key = key
	return lease, err
}

func (d *double) other(lease locker.Lease) locker.Lease {
	if other, ok := d.others.Load(lease.ID); ok {
		lease.Key = other.(string)
	}
	return lease
}

func (d *double) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	key := lease.Key
	lease, err := d.Locker.Extend(ctx, d.other(lease))
	lease.Key = key
	return lease, err
}

func (d *double) Release(ctx context.Context, lease locker.Lease) error {
	return d.Locker.Release(ctx, d.other(lease))
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

// stuck gives a token twice now and then.
type stuck struct {
	locker.Locker
	mu    sync.Mutex
	given map[string]uint64 // by key
	real  map[string]uint64 // by ID, where it was not given
}

func (s *stuck) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	lease, err := s.Locker.Acquire(ctx, req)
	s.mu.Lock()
	defer s.mu.Unlock()
	given := s.given[req.Key]
	switch {
	case err != nil:
	case given != 0 && rand.IntN(often) == 0:
		s.real[req.ID] = lease.Token
		lease.Token = given
	default:
		s.given[req.Key] = lease.Token
	}
	return lease, err
}

func (s *stuck) honest(lease locker.Lease) locker.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	if token, ok := s.real[lease.ID]; ok {
		lease.Token = token
	}
	return lease
}

func (s *stuck) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	return s.Locker.Extend(ctx, s.honest(lease)) // the token of an extended lease does not count
}

func (s *stuck) Release(ctx context.Context, lease locker.Lease) error {
	return s.Locker.Release(ctx, s.honest(lease))
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
