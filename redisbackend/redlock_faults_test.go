package redisbackend_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
)

var faultsTime = flag.Duration("faults", 8*time.Second, "how long TestRedlockFaults goes on")

// belief is the time in which a client believed that it had a lock.
type belief struct {
	token      uint64
	began, end time.Time
}

// TestRedlockFaults kills or stops a random minority every second, and takes one server's memory away per quarantine, while
// eight clients lock and write through a guard.
func TestRedlockFaults(t *testing.T) {
	t.Parallel()
	const keys, quarantine = 3, 3 * time.Second
	group := servertest.RedisServers(t, 5)
	redistest.Remember(t, group, "locker:")
	rawURL := group.URL + "?durable=true&quarantine=" + quarantine.String()
	ctx, cancel := context.WithTimeout(t.Context(), *faultsTime)
	defer cancel()

	var (
		mu      sync.Mutex
		beliefs [keys][]belief
		guard   locker.Guard
		grants  atomic.Int64
		lost    atomic.Int64
		clients sync.WaitGroup
	)
	for range 8 {
		client, err := locker.Open(t.Context(), rawURL, locker.WithTTL(time.Second))
		if err != nil {
			t.Fatal(err)
		}
		clients.Go(func() {
			defer client.Close()
			for ctx.Err() == nil {
				k := rand.IntN(keys)
				lock, err := client.Acquire(ctx, fmt.Sprint(k))
				if err != nil {
					continue // with most servers out of reach for a moment
				}
				b := belief{token: lock.Token(), began: time.Now()}
				work := time.NewTimer(rand.N(60 * time.Millisecond))
				select {
				case <-work.C:
				case <-lock.Done():
					lost.Add(1)
				}
				if lock.Err() == nil {
					err := guard.Do(fmt.Sprint(k), lock.Token(), func() error { return nil })
					if err != nil && lock.Err() == nil {
						t.Errorf("a fresh token was refused: %v", err)
					}
				}
				b.end = time.Now()
				if deadline := lock.Deadline(); deadline.Before(b.end) {
					b.end = deadline
				}
				mu.Lock()
				beliefs[k] = append(beliefs[k], b)
				mu.Unlock()
				grants.Add(1)
				_ = lock.Release(t.Context()) // may be lost
			}
		})
	}
	clients.Go(func() { hurt(ctx, t, group, quarantine) })
	clients.Go(func() {
		progress(ctx, t, &grants)
	})
	clients.Wait()

	for k := range beliefs {
		slices.SortFunc(beliefs[k], func(a, b belief) int { return a.began.Compare(b.began) })
		for i := 1; i < len(beliefs[k]); i++ {
			a, b := beliefs[k][i-1], beliefs[k][i]
			if a.end.After(b.began) {
				t.Errorf("key %d: token %d was believed until %v after token %d was granted", k, a.token, a.end.Sub(b.began), b.token)
			}
			if a.token >= b.token {
				t.Errorf("key %d: token %d after %d", k, b.token, a.token)
			}
		}
	}
	t.Logf("%d locks, %d of them lost", grants.Load(), lost.Load())
}

// hurt kills or stops one or two servers at a time for most of a second, and takes the memory of one away per quarantine. No
// more than a minority is out of votes at a time.
func hurt(ctx context.Context, t *testing.T, group *servertest.RedisGroup, quarantine time.Duration) {
	always := context.WithoutCancel(ctx)
	do := func(err error) {
		if err != nil {
			t.Errorf("the servers cannot be hurt: %v", err)
		}
	}
	wiped, last := time.Time{}, -1
	for ctx.Err() == nil {
		order := rand.Perm(len(group.Members))
		most := 2
		if time.Since(wiped) < 2*quarantine && last >= 0 {
			order = slices.DeleteFunc(order, func(i int) bool { return i == last })
			if time.Since(wiped) < quarantine+quarantine/4 {
				most = 1
			}
		} else {
			last, wiped, most = order[0], time.Now(), 1
			do(group.Members[last].Wipe(always))
			order = order[1:]
		}
		var undo []func(context.Context) error
		for _, i := range order[:1+rand.IntN(most)] {
			if m := group.Members[i]; rand.IntN(2) == 0 {
				do(m.Kill(always))
				undo = append(undo, m.Start)
			} else {
				do(m.Pause(always))
				undo = append(undo, m.Resume)
			}
		}
		rest(ctx, 700*time.Millisecond)
		for _, f := range undo {
			do(f(always))
		}
		rest(ctx, 300*time.Millisecond)
	}
}

// progress fails the test if nobody gets a lock for three seconds.
func progress(ctx context.Context, t *testing.T, grants *atomic.Int64) {
	for before := int64(0); ; before = grants.Load() {
		rest(ctx, 3*time.Second)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return
		}
		if grants.Load() == before {
			t.Error("nobody got a lock for 3 s")
		}
	}
}

func rest(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
