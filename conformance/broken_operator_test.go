package conformance

import (
	"context"
	"errors"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/fec20105/locker"
)

// operated is a Locker of which operators see and do something else than is so.
type operated struct {
	*connection
	inspect func(context.Context, string) (locker.Holding, error)
	list    func(context.Context) iter.Seq2[locker.Holding, error]
	breaks  func(context.Context, locker.Holding) error
}

func (o *operated) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	return o.inspect(ctx, key)
}

func (o *operated) List(ctx context.Context) iter.Seq2[locker.Holding, error] { return o.list(ctx) }

func (o *operated) Break(ctx context.Context, held locker.Holding) error { return o.breaks(ctx, held) }

// operators makes a fault of what operators see and do.
func operators(change func(o *operated)) func() fault {
	return always(func(f *faulty) {
		c := f.Locker.(*connection)
		o := &operated{connection: c, inspect: c.Inspect, list: c.List, breaks: c.Break}
		change(o)
		f.Locker = o
	})
}

// sees makes an Inspect that answers something else than is so.
func sees(other func(locker.Holding) locker.Holding) func() fault {
	return operators(func(o *operated) {
		o.inspect = func(ctx context.Context, key string) (locker.Holding, error) {
			holding, err := o.connection.Inspect(ctx, key)
			return other(holding), err
		}
	})
}

func nothing(h locker.Holding) locker.Holding { return locker.Holding{Key: h.Key, Waiters: -1} }

// theFirst tells for ever of the first holder of a key.
func theFirst() func(locker.Holding) locker.Holding {
	var mu sync.Mutex
	first := make(map[string]locker.Holding)
	return func(h locker.Holding) locker.Holding {
		mu.Lock()
		defer mu.Unlock()
		if known, ok := first[h.Key]; ok {
			known.Waiters = h.Waiters
			return known
		}
		if h.Token != 0 {
			first[h.Key] = h
		}
		return h
	}
}

func listsBut() fault {
	return operators(func(o *operated) {
		o.list = func(ctx context.Context) iter.Seq2[locker.Holding, error] {
			return func(yield func(locker.Holding, error) bool) {
				n := 0
				for holding, err := range o.connection.List(ctx) {
					if n++; n == 10 && err == nil {
						continue
					}
					if !yield(holding, err) {
						return
					}
				}
			}
		}
	})()
}

func listsOn() fault {
	return operators(func(o *operated) {
		o.list = func(ctx context.Context) iter.Seq2[locker.Holding, error] {
			return func(yield func(locker.Holding, error) bool) {
				for range 2 {
					for holding, err := range o.connection.List(ctx) {
						if !yield(holding, err) {
							return
						}
					}
				}
			}
		}
	})()
}

func breaksAnything() fault {
	return operators(func(o *operated) {
		o.breaks = func(ctx context.Context, held locker.Holding) error {
			holding, err := o.connection.Inspect(ctx, held.Key)
			if err != nil {
				return err
			}
			return o.connection.Break(ctx, holding)
		}
	})()
}

// firstLabel tells the label of the first who ever held the key.
func firstLabel() fault {
	first := new(leases)
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			lease, err := f.Locker.Acquire(ctx, req)
			known, ok := first.get(req.Key)
			if err == nil && !ok {
				first.put(req.Key, lease)
			}
			if held, is := errors.AsType[*locker.HeldError](err); is && ok {
				held.Holder = known.Holder
			}
			return lease, err
		}
	}
}

// cutLabels has room for 63 bytes.
func cutLabels(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		label := req.Holder
		req.Holder = label[:min(63, len(label))]
		if label == "first" {
			req.Holder = "f"
		}
		lease, err := f.Locker.Acquire(ctx, req)
		lease.Holder = label
		return lease, err
	}
}

// remainsOfAnother tells a refused request its own TTL.
func remainsOfAnother(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if held, ok := errors.AsType[*locker.HeldError](err); ok {
			held.Remaining = req.TTL
		}
		return lease, err
	}
}

func lostAtRelease() fault {
	var mu sync.Mutex
	lost := make(map[string]func(locker.Reason))
	return func(f *faulty) {
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			mu.Lock()
			lost[req.ID] = req.Lost
			mu.Unlock()
			return f.Locker.Acquire(ctx, req)
		}
		f.release = func(ctx context.Context, lease locker.Lease) error {
			err := f.Locker.Release(ctx, lease)
			mu.Lock()
			tell := lost[lease.ID]
			mu.Unlock()
			if err == nil && tell != nil {
				tell(locker.ReasonTaken)
			}
			return err
		}
	}
}

func lostTwice(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		if tell := req.Lost; tell != nil {
			req.Lost = func(r locker.Reason) {
				tell(r)
				tell(r)
			}
		}
		return f.Locker.Acquire(ctx, req)
	}
}

// changing promises another Fallback each time.
func changing() func(*locker.Capabilities) {
	var asked atomic.Int64
	return func(caps *locker.Capabilities) { caps.Fallback += fallbackPeriod * 10 * 1 << min(asked.Add(1), 4) }
}
