package main

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
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
	lessIsMore bool // less is better
}

var scenarios = []scenario{
	{
		name:    "uncontended",
		figures: []figure{{"acquire + release, p50", "µs", true}},
		floors:  true,
		run:     uncontended,
	},
	{
		name:    "32 goroutines of one process, one key",
		figures: []figure{{"pairs per second", "/s", false}, {"luckiest / unluckiest goroutine", "", true}},
		run:     contended,
	},
	{
		name: "50 clients wait",
		figures: []figure{
			{"server commands per client", "/s", true},
			{"connections per client", "", true},
		},
		run: waiting,
	},
	{
		name:    "release to the next client holding",
		figures: []figure{{"p50", "ms", true}, {"p99", "ms", true}},
		run:     handover,
	},
	{
		name: "5,000 locks held by one client",
		figures: []figure{
			{"heap per lock", "B", true},
			{"goroutines per lock", "", true},
			{"server commands per lock and TTL", "", true},
		},
		run: held,
	},
}

// bench is one run against one server.
type bench struct {
	url    string
	server *monitor
	keys   int
}

// key is a name that no scenario has used before.
func (b *bench) key() string {
	b.keys++
	return "bench/" + strconv.Itoa(b.keys)
}

// open makes n clients of a peer, and a function that closes them.
func (b *bench) open(ctx context.Context, p peer, n int) ([]client, func(), error) {
	var clients []client
	closeAll := func() {
		for _, c := range clients {
			_ = c.close() // what a peer says at its end is not measured
		}
	}
	for range n {
		c, err := p.open(ctx, b.url)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		clients = append(clients, c)
	}
	return clients, closeAll, nil
}

func pair(ctx context.Context, c client, key string) error {
	unlock, err := c.lock(ctx, key)
	if err != nil {
		return err
	}
	return unlock()
}

func uncontended(ctx context.Context, b *bench, p peer) ([]float64, error) {
	clients, closeAll, err := b.open(ctx, p, 1)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	key := b.key()
	const warmUp, pairs = 200, 3000
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

func contended(ctx context.Context, b *bench, p peer) ([]float64, error) {
	clients, closeAll, err := b.open(ctx, p, 1)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	const goroutines, span = 32, 2 * time.Second
	key := b.key()
	shares := make([]float64, goroutines)
	// The end of the span ends waits too: some libraries let a waiter starve beyond it.
	during, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	var loops errgroup.Group
	for i := range shares {
		loops.Go(func() error {
			for during.Err() == nil {
				if err := pair(during, clients[0], key); err == nil {
					shares[i]++
				} else if during.Err() == nil {
					return err
				}
			}
			return nil
		})
	}
	if err := loops.Wait(); err != nil {
		return nil, err
	}
	total := 0.0
	for _, n := range shares {
		total += n
	}
	return []float64{total / span.Seconds(), slices.Max(shares) / max(1, slices.Min(shares))}, nil
}

func waiting(ctx context.Context, b *bench, p peer) ([]float64, error) {
	const waiters, span = 50, 4 * time.Second
	clients, closeAll, err := b.open(ctx, p, waiters+1)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	key := b.key()
	unlock, err := clients[0].lock(ctx, key)
	if err != nil {
		return nil, err
	}
	before, err := b.server.connections(ctx)
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithCancel(ctx)
	var waits sync.WaitGroup
	for _, c := range clients[1:] {
		waits.Go(func() {
			if unlock, err := c.lock(wait, key); err == nil {
				_ = unlock() // granted between the measurement and the end of the waits
			}
		})
	}
	settle(ctx, time.Second) // all have asked, and none asks again because it is new
	commands, err := b.server.commands(ctx, span)
	if err != nil {
		cancel()
		return nil, err
	}
	after, err := b.server.connections(ctx)
	cancel()
	waits.Wait()
	if err == nil {
		err = unlock()
	}
	return []float64{float64(commands) / span.Seconds() / waiters, 1 + float64(after-before)/waiters}, err
}

func handover(ctx context.Context, b *bench, p peer) ([]float64, error) {
	clients, closeAll, err := b.open(ctx, p, 2)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	key := b.key()
	const times = 60
	var gaps []float64
	holder, next := clients[0], clients[1]
	for range times {
		unlock, err := holder.lock(ctx, key)
		if err != nil {
			return nil, err
		}
		type grant struct {
			at     time.Time
			unlock func() error
			err    error
		}
		granted := make(chan grant, 1)
		go func() {
			unlock, err := next.lock(ctx, key)
			granted <- grant{time.Now(), unlock, err}
		}()
		settle(ctx, 20*time.Millisecond) // the other one waits by now
		released := time.Now()
		if err := unlock(); err != nil {
			return nil, err
		}
		g := <-granted
		if g.err != nil {
			return nil, g.err
		}
		gaps = append(gaps, float64(g.at.Sub(released))/float64(time.Millisecond))
		if err := g.unlock(); err != nil {
			return nil, err
		}
		holder, next = next, holder
	}
	return []float64{percentile(gaps, 50), percentile(gaps, 99)}, nil
}

func held(ctx context.Context, b *bench, p peer) ([]float64, error) {
	const locks, span = 5000, 6 * time.Second // more than one heartbeat of each
	clients, closeAll, err := b.open(ctx, p, 1)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	if err := pair(ctx, clients[0], b.key()); err != nil { // connections are not locks
		return nil, err
	}
	heap, goroutines := footprint()
	unlocks := make([]func() error, locks)
	var takes errgroup.Group
	takes.SetLimit(32)
	for i := range unlocks {
		key := fmt.Sprintf("%s/%d", b.key(), i)
		takes.Go(func() (err error) {
			unlocks[i], err = clients[0].lock(ctx, key)
			return err
		})
	}
	if err := takes.Wait(); err != nil {
		return nil, err
	}
	heapHeld, goroutinesHeld := footprint()
	commands, err := b.server.commands(ctx, span)
	if err != nil {
		return nil, err
	}
	var releases errgroup.Group
	releases.SetLimit(32)
	for _, unlock := range unlocks {
		releases.Go(unlock)
	}
	return []float64{
		(heapHeld - heap) / locks,
		(goroutinesHeld - goroutines) / locks,
		float64(commands) / locks * ttl.Seconds() / span.Seconds(),
	}, releases.Wait()
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

func percentile(values []float64, p int) float64 {
	slices.Sort(values)
	return values[min(len(values)-1, len(values)*p/100)]
}
