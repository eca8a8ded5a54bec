package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/fec20105/locker"
)

var benchCommand = &command{
	name:  "bench",
	args:  "[URL]",
	short: "measure how fast a lock server is",
	long: `
Measures what locks on this server cost through this library, seen from here, on keys of its own that begin with bench/:

  round trip    the least that the server can be asked: who holds a free key
  uncontended   acquire and release of a key that nobody else wants
  contended     the same by all clients at once on one key: how long one waits and holds
  handover      from one client's release to the grant of another that waits
  held          extending one of a thousand locks that are held

p50 and p99 are the times that half and 99 of 100 took at most.`,
	lines: `
  locker bench file:
  locker bench --duration 10s --clients 32 redis://db1:6379`,
	define: func(fs *flag.FlagSet) func(context.Context, []string) error {
		url := urlFlag(fs)
		b := new(benchmark)
		fs.DurationVar(&b.duration, "duration", 2*time.Second, "how long each line is measured: a `DURATION`")
		fs.IntVar(&b.clients, "clients", 8, "the `NUMBER` of clients that fight for one key")
		return func(ctx context.Context, args []string) error {
			if err := oneURL(url, args); err != nil {
				return err
			}
			if b.duration < 10*time.Millisecond || b.clients < 1 || b.clients > 1000 {
				return usageError{errors.New("give a --duration of 10ms or more, and 1 to 1000 --clients")}
			}
			b.url = urlOf(*url)
			ctx, stop := untilSignal(ctx)
			defer stop()
			err := b.run(ctx)
			return cmp.Or(interruptedBy(ctx), err)
		}
	},
}

type benchmark struct {
	url      string
	duration time.Duration
	clients  int
	prefix   string
}

// scenario measures something again and again until the time is over.
type scenario struct {
	name string
	run  func(b *benchmark, ctx context.Context) (took []time.Duration, err error)
}

func (b *benchmark) run(ctx context.Context) error {
	b.prefix = "bench/" + strings.ToLower(rand.Text()[:10]) + "/"
	table := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tp50\tp99\tper second\t")
	for _, s := range []scenario{
		{"round trip", (*benchmark).roundTrip},
		{"uncontended", (*benchmark).uncontended},
		{"contended", (*benchmark).contended},
		{"handover", (*benchmark).handover},
		{"held", (*benchmark).held},
	} {
		took, err := s.run(b, ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if len(took) == 0 {
			return fmt.Errorf("%s: not even one was done in %v: give a longer --duration", s.name, b.duration)
		}
		perSecond := float64(len(took)) / b.duration.Seconds()
		slices.Sort(took)
		fmt.Fprintf(table, "%s\t%v\t%v\t%.0f\t\n", s.name, rounded(took[len(took)/2]), rounded(took[len(took)*99/100]), perSecond)
	}
	return table.Flush()
}

func rounded(d time.Duration) time.Duration { return d.Round(100 * time.Nanosecond) }

// open makes a client with connections of its own.
func (b *benchmark) open(ctx context.Context) (*locker.Client, func(), error) {
	client, err := locker.Open(ctx, b.url)
	if err != nil {
		return nil, nil, withoutEtcd(b.url, err)
	}
	return client, func() { _ = client.Close() }, nil
}

// measure calls f until the time is over, and returns how long each call took.
func (b *benchmark) measure(ctx context.Context, f func() error) (took []time.Duration, err error) {
	over := time.Now().Add(b.duration)
	for began := time.Now(); began.Before(over) && ctx.Err() == nil; began = time.Now() {
		if err := f(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
	}
	return took, ctx.Err()
}

func pair(ctx context.Context, client *locker.Client, key string) error {
	lock, err := client.Acquire(ctx, key)
	if err != nil {
		return err
	}
	return lock.Release(ctx)
}

func (b *benchmark) roundTrip(ctx context.Context) ([]time.Duration, error) {
	client, stop, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	return b.measure(ctx, func() error { _, err := client.Inspect(ctx, b.prefix+"free"); return err })
}

func (b *benchmark) uncontended(ctx context.Context) ([]time.Duration, error) {
	client, stop, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	return b.measure(ctx, func() error { return pair(ctx, client, b.prefix+"uncontended") })
}

func (b *benchmark) contended(ctx context.Context) (all []time.Duration, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range b.clients {
		client, stop, openErr := b.open(ctx)
		if openErr != nil {
			err = openErr
			break
		}
		defer stop()
		wg.Go(func() {
			took, failure := b.measure(ctx, func() error { return pair(ctx, client, b.prefix+"contended") })
			mu.Lock()
			defer mu.Unlock()
			all, err = append(all, took...), errors.Join(err, failure)
		})
	}
	wg.Wait()
	return all, err
}

func (b *benchmark) handover(ctx context.Context) (took []time.Duration, err error) {
	holder, stop, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	next, stopNext, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer stopNext()
	key := b.prefix + "handover"
	lock, err := holder.Acquire(ctx, key)
	over := time.Now().Add(b.duration)
	for err == nil && time.Now().Before(over) {
		type grant struct {
			lock *locker.Lock
			at   time.Time
			err  error
		}
		granted := make(chan grant, 1)
		go func() {
			l, err := next.Acquire(ctx, key)
			granted <- grant{l, time.Now(), err}
		}()
		b.untilWaiting(ctx, holder, key)
		released := time.Now()
		releaseErr := lock.Release(ctx)
		g := <-granted
		if err = errors.Join(releaseErr, g.err); err == nil {
			took = append(took, g.at.Sub(released))
			lock, holder, next = g.lock, next, holder
		}
	}
	if err == nil {
		err = lock.Release(ctx)
	}
	return took, err
}

// untilWaiting returns when a request waits for the key, or after a moment where the backend cannot tell.
func (b *benchmark) untilWaiting(ctx context.Context, client *locker.Client, key string) {
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for range 200 {
		h, err := client.Inspect(ctx, key)
		if err != nil || h.Waiters > 0 {
			return
		}
		<-ticker.C
		if h.Waiters < 0 {
			return
		}
	}
}

func (b *benchmark) held(ctx context.Context) ([]time.Duration, error) {
	const many = 1000
	client, stop, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	locks := make([]*locker.Lock, 0, many)
	for i := range many {
		lock, err := client.Acquire(ctx, fmt.Sprintf("%sheld/%d", b.prefix, i), locker.WithTTL(time.Minute))
		if err != nil {
			return nil, err
		}
		locks = append(locks, lock)
	}
	n := 0
	return b.measure(ctx, func() error {
		n++
		return locks[n%many].Extend(ctx)
	})
}
