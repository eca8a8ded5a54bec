package main

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	longTTL  = 15 * time.Second // of locks that nothing happens to
	shortTTL = 3 * time.Second  // of those that expire
)

// A scenario puts one load on one peer and returns figures, the same for every peer and round.
type scenario struct {
	name    string
	figures []figure
	floors  bool // whether bare floors can run it
	run     func(ctx context.Context, b *bench, p peer) ([]float64, error)
}

// figure is one number of a scenario.
type figure struct {
	name, unit string
	lessIsMore bool
}

var uncontendedFigures = []figure{{"acquire + release, p50", "µs", true}}

var scenarios = []scenario{
	{name: "uncontended", figures: uncontendedFigures, floors: true, run: uncontended},
	contended(4), contended(32), contended(256),
	{
		name: "8 processes of 4 goroutines, one key",
		figures: []figure{
			{"pairs per second", "/s", false},
			{"luckiest / unluckiest goroutine", "", true},
			{"server commands per pair", "", true},
		},
		run: processes,
	},
	waiting(1), waiting(10),
	{
		name:    "release to the next client holding",
		figures: []figure{{"p50", "ms", true}, {"p99", "ms", true}},
		run:     handover,
	},
	holding(1000), holding(5000), holding(50000),
	{
		name:    "a holder is killed",
		figures: []figure{{"until the next holder, share of the TTL", "", true}},
		run:     crash,
	},
	{
		name: "a holder's link is cut",
		figures: []figure{
			{"until it is told, share of the TTL", "", true},
			{"told before the next holder has the lock, at least", "ms", false},
		},
		run: lossNotice,
	},
}

func pair(ctx context.Context, c client, key string) error {
	lock, err := c.lock(ctx, key)
	if err != nil {
		return err
	}
	return lock.unlock()
}

func uncontended(ctx context.Context, b *bench, p peer) ([]float64, error) {
	clients, closeAll, err := b.open(ctx, p, 1, longTTL)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	key := b.key()
	warmUp, pairs := b.small(200, 10), b.small(3000, 50)
	times := make([]float64, 0, pairs)
	for i := range warmUp + pairs {
		start := time.Now()
		if err := pair(ctx, clients[0], key); err != nil {
			return nil, err
		}
		if i >= warmUp {
			times = append(times, float64(time.Since(start))/float64(time.Microsecond))
		}
	}
	return []float64{percentile(times, 50)}, nil
}

// contended has goroutines of one client take the same lock in turn.
func contended(goroutines int) scenario {
	return scenario{
		name:    fmt.Sprintf("%d goroutines of one process, one key", goroutines),
		figures: []figure{{"pairs per second", "/s", false}, {"luckiest / unluckiest goroutine", "", true}},
		run: func(ctx context.Context, b *bench, p peer) ([]float64, error) {
			clients, closeAll, err := b.open(ctx, p, 1, longTTL)
			if err != nil {
				return nil, err
			}
			defer closeAll()
			span := b.short(2 * time.Second)
			shares, err := contend(ctx, clients[0], b.key(), goroutines, span)
			if err != nil {
				return nil, err
			}
			total, luck := spread(shares)
			return []float64{total / span.Seconds(), luck}, nil
		},
	}
}

// contend takes and releases a lock in several goroutines for a while, and tells how often each had it.
func contend(ctx context.Context, c client, key string, goroutines int, span time.Duration) ([]float64, error) {
	// The end of the span ends waits too: some libraries let a waiter starve beyond it.
	during, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	shares := make([]float64, goroutines)
	var loops errgroup.Group
	for i := range shares {
		loops.Go(func() error {
			for during.Err() == nil {
				lock, err := c.lock(during, key)
				if err == nil {
					shares[i]++
					err = lock.unlock()
				}
				if err != nil && during.Err() == nil {
					return err
				}
			}
			return nil
		})
	}
	return shares, loops.Wait()
}

// spread is the sum of the shares, and how much luckier the luckiest was than the unluckiest.
func spread(shares []float64) (total, luck float64) {
	for _, n := range shares {
		total += n
	}
	return total, slices.Max(shares) / max(1, slices.Min(shares))
}

// waiting has 50 clients wait for the same keys, each for all of them.
func waiting(keys int) scenario {
	const waiters = 50
	name := fmt.Sprintf("%d clients wait for %d keys", waiters, keys)
	if keys == 1 {
		name = fmt.Sprintf("%d clients wait for one key", waiters)
	}
	return scenario{
		name: name,
		figures: []figure{
			{"server commands per client", "/s", true},
			{"connections per client", "", true},
			{"processor time per client", "ms/s", true},
		},
		run: func(ctx context.Context, b *bench, p peer) ([]float64, error) {
			before, err := b.monitor.connections(ctx) // some peers connect when they are opened, others at the first call
			if err != nil {
				return nil, err
			}
			clients, closeAll, err := b.open(ctx, p, waiters+1, longTTL)
			if err != nil {
				return nil, err
			}
			defer closeAll()
			names := make([]string, keys)
			locks := make([]held, keys)
			for i := range names {
				names[i] = b.key()
				if locks[i], err = clients[0].lock(ctx, names[i]); err != nil {
					return nil, err
				}
			}
			wait, cancel := context.WithCancel(ctx)
			var waits sync.WaitGroup
			for _, c := range clients[1:] {
				for _, name := range names {
					waits.Go(func() {
						if lock, err := c.lock(wait, name); err == nil {
							_ = lock.unlock() // granted between the measurement and the end of the waits
						}
					})
				}
			}
			defer waits.Wait()
			defer cancel()
			settle(ctx, time.Second) // all have asked, and none asks again because it is new
			span := b.short(4 * time.Second)
			cpu := processorTime()
			settle(ctx, span)
			cpu = processorTime() - cpu
			commands, err := b.monitor.commands(ctx, span)
			if err != nil {
				return nil, err
			}
			after, err := b.monitor.connections(ctx)
			if err != nil {
				return nil, err
			}
			cancel()
			waits.Wait()
			for _, lock := range locks {
				if err := lock.unlock(); err != nil {
					return nil, err
				}
			}
			return []float64{
				float64(commands) / span.Seconds() / waiters,
				float64(after-before) / (waiters + 1),
				cpu.Seconds() * 1000 / span.Seconds() / waiters,
			}, nil
		},
	}
}

func handover(ctx context.Context, b *bench, p peer) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	clients, closeAll, err := b.open(ctx, p, 2, longTTL)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	key := b.key()
	var gaps []float64
	holder, next := clients[0], clients[1]
	for range b.small(60, 5) {
		lock, err := holder.lock(ctx, key)
		if err != nil {
			return nil, err
		}
		granted := await(ctx, next, key)
		settle(ctx, 20*time.Millisecond) // the other one waits by now
		released := time.Now()
		if err := lock.unlock(); err != nil {
			return nil, err
		}
		g := <-granted
		if g.err != nil {
			return nil, g.err
		}
		gaps = append(gaps, float64(g.at.Sub(released))/float64(time.Millisecond))
		if err := g.lock.unlock(); err != nil {
			return nil, err
		}
		holder, next = next, holder
	}
	return []float64{percentile(gaps, 50), percentile(gaps, 99)}, nil
}

// grant is how a wait ended.
type grant struct {
	at   time.Time
	lock held
	err  error
}

// await waits for a lock in the background.
func await(ctx context.Context, c client, key string) <-chan grant {
	granted := make(chan grant, 1)
	go func() {
		lock, err := c.lock(ctx, key)
		granted <- grant{time.Now(), lock, err}
	}()
	return granted
}

// holding has one client hold many locks.
func holding(locks int) scenario {
	return scenario{
		name: fmt.Sprintf("%d locks held by one client", locks),
		figures: []figure{
			{"heap per lock", "B", true},
			{"goroutines per lock", "", true},
			{"connections", "", true},
			{"server commands", "/s", true},
		},
		run: func(ctx context.Context, b *bench, p peer) ([]float64, error) {
			return hold(ctx, b, p, b.small(locks, 50))
		},
	}
}

func hold(ctx context.Context, b *bench, p peer, n int) ([]float64, error) {
	before, err := b.monitor.connections(ctx)
	if err != nil {
		return nil, err
	}
	clients, closeAll, err := b.open(ctx, p, 1, longTTL)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	if err := pair(ctx, clients[0], b.key()); err != nil { // connections are not locks
		return nil, err
	}
	prefix := b.key()
	keys := make([]string, n) // a program has its keys anyway
	for i := range keys {
		keys[i] = fmt.Sprintf("%s/%d", prefix, i)
	}
	locks := make([]held, n)
	heap, goroutines := footprint()
	var takes errgroup.Group
	takes.SetLimit(32)
	for i := range locks {
		takes.Go(func() (err error) {
			locks[i], err = clients[0].lock(ctx, keys[i])
			return err
		})
	}
	err = takes.Wait()
	var heapHeld, goroutinesHeld float64
	var commands int64
	var after int
	span := b.short(6 * time.Second) // more than one heartbeat of each
	if err == nil {
		heapHeld, goroutinesHeld = footprint()
		if after, err = b.monitor.connections(ctx); err == nil {
			commands, err = b.monitor.commands(ctx, span)
		}
	}
	var releases errgroup.Group
	releases.SetLimit(32)
	for _, lock := range locks {
		if lock.unlock != nil {
			releases.Go(lock.unlock)
		}
	}
	if released := releases.Wait(); err == nil {
		err = released
	}
	return []float64{
		(heapHeld - heap) / float64(n), (goroutinesHeld - goroutines) / float64(n), float64(after - before), float64(commands) / span.Seconds(),
	}, err
}

// footprint is the live heap and the number of goroutines, after what is garbage has gone.
func footprint() (heap, goroutines float64) {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc), float64(runtime.NumGoroutine())
}

// settle lets a load come to rest before it is measured.
func settle(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// percentile is not a number if there are no values; those that are not a number count as the greatest.
func percentile(values []float64, p int) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	slices.SortFunc(values, func(a, b float64) int {
		switch {
		case a < b || math.IsNaN(b) && !math.IsNaN(a):
			return -1
		case a > b || math.IsNaN(a) && !math.IsNaN(b):
			return 1
		}
		return 0
	})
	return values[min(len(values)-1, len(values)*p/100)]
}
