package conformance

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var exclusionRows = []row{
	{
		name: "belief-windows",
		clause: "Of all who use a key at most one at a time believes to hold it: the spans from the return of Acquire to the " +
			"first of Release, loss and deadline never overlap.",
		run: beliefWindows,
	},
	{
		name: "belief-windows-under-faults",
		clause: "Beliefs do not overlap either while links are cut, hang, delay and reset; and once the leases of that time are " +
			"over, and what dead waiters may delay, everybody gets the lock again.",
		run: beliefWindowsUnderFaults,
	},
	{
		name: "linearizable",
		clause: "Every history of Acquire, Extend and Release is one that a single lock could have had in which a grant ends " +
			"by a release or after its TTL, and tokens rise.",
		run: linearizable,
	},
}

const (
	believers  = 8   // clients that contend
	operations = 300 // of each
)

// belief is the time during which one client may have relied on one grant.
type belief struct {
	client   int
	token    uint64
	from, to time.Time
}

// resource is what the lock of one key protects: a counter that loses updates when two use it at once. It is atomic
// only for the race detector, which does not know of locks on other machines.
type resource struct {
	key     string
	counter atomic.Int64
	wrote   atomic.Int64 // updates that were surely made under the lock
	unsure  atomic.Bool  // an update was held up beyond the deadline, between looking and writing

	mu      sync.Mutex
	beliefs []belief
}

func (t *trial) resources(n int) []*resource {
	all := make([]*resource, n)
	for i := range all {
		all[i] = &resource{key: t.key(strconv.Itoa(i))}
	}
	return all
}

// use updates the resource under a lock that was just acquired, and notes the belief. It lasts until hold is over
// or ctx or the lock ends.
func (r *resource) use(ctx context.Context, client int, lock *locker.Lock, hold time.Duration) {
	b := belief{client: client, token: lock.Token(), from: time.Now()}
	count := r.counter.Load()
	timer := time.NewTimer(hold)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-lock.Done():
	}
	if lock.Err() == nil {
		r.counter.Store(count + 1)
		if lock.Err() == nil {
			r.wrote.Add(1)
		} else {
			r.unsure.Store(true)
		}
	}
	b.to = time.Now()
	if deadline := lock.Deadline(); deadline.Before(b.to) {
		b.to = deadline
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.beliefs = append(r.beliefs, b)
}

// check fails the row if two believed at once, if their tokens did not rise, or if an update was lost.
func (r *resource) check(t *trial) {
	slices.SortFunc(r.beliefs, func(a, b belief) int { return a.from.Compare(b.from) })
	for i := 1; i < len(r.beliefs); i++ {
		b, next := r.beliefs[i-1], r.beliefs[i]
		if overlap := b.to.Sub(next.from); overlap > 0 {
			t.Errorf("%q: client %d (token %d) believed to hold it for another %v after client %d (token %d) had got it",
				r.key, b.client, b.token, overlap, next.client, next.token)
			break // one is enough
		}
		if next.token <= b.token {
			t.Errorf("%q: client %d got token %d after client %d had got %d", r.key, next.client, next.token, b.client, b.token)
			break
		}
	}
	if got, want := r.counter.Load(), r.wrote.Load(); got != want && !r.unsure.Load() {
		t.Errorf("%q: the counter is %d after %d updates under the lock", r.key, got, want)
	}
}

func beliefWindows(t *trial) {
	resources := t.resources(3)
	for i := range believers {
		client, _ := t.client()
		t.spawn(func() {
			for range operations {
				r := resources[rand.N(len(resources))]
				lock, err := client.Acquire(t.ctx, r.key)
				if err != nil {
					t.Fatalf("client %d: acquire on a good link: %v", i, err)
				}
				r.use(t.ctx, i, lock, rand.N(5*time.Millisecond))
				// A machine that stands still for a TTL loses locks on a good link too; what counts is who believed
				// what.
				if err := lock.Release(t.ctx); err != nil && !errors.Is(err, locker.ErrLost) {
					t.Fatalf("client %d: release on a good link: %v", i, err)
				}
			}
		})
	}
	t.spawned.Wait()
	for _, r := range resources {
		r.check(t)
	}
}

// beliefWindowsUnderFaults lets the clients work until they are through or 5 T are over, and heals their links then.
func beliefWindowsUnderFaults(t *trial) {
	resources := t.resources(3) // few, so that somebody nearly always waits
	faulty, heal := context.WithTimeout(t.ctx, 5*t.TTL)
	defer heal()
	var work, chaos sync.WaitGroup
	var used, lost atomic.Int64
	clients := make([]*locker.Client, believers)
	for i := range clients {
		client, net := t.client(locker.WithWait(t.TTL/2), locker.WithReleaseTimeout(t.TTL/4))
		clients[i] = client
		t.spawnIn(&chaos, func() { t.injectFaults(faulty, net) })
		t.spawnIn(&work, func() {
			for range operations {
				if faulty.Err() != nil {
					return
				}
				hold := rand.N(5 * time.Millisecond)
				if rand.N(12) == 0 { // long enough for a heartbeat to fail
					hold = rand.N(2 * t.TTL)
				}
				r := resources[rand.N(len(resources))]
				if lock, err := client.Acquire(faulty, r.key); err == nil {
					r.use(faulty, i, lock, hold)
					used.Add(1)
					if errors.Is(lock.Release(t.ctx), locker.ErrLost) {
						lost.Add(1)
					}
				}
			}
		})
	}
	work.Wait()
	heal()
	chaos.Wait()
	healed := time.Now()
	calm, cancel := context.WithDeadline(t.ctx, healed.Add(t.freed()+max(2*time.Second, t.caps.Fallback+t.slack)))
	defer cancel()
	for i, client := range clients {
		t.spawn(func() {
			for _, r := range resources {
				lock, err := client.Acquire(calm, r.key)
				for err != nil && calm.Err() == nil { // a connection may have been reset, a wait cut short
					lock, err = client.Acquire(calm, r.key)
				}
				if err != nil {
					t.Errorf("client %d has not got %q %v after the last fault: %v", i, r.key, time.Since(healed), err)
					return
				}
				r.use(calm, i, lock, 0)
				if err := lock.Release(t.ctx); err != nil {
					t.Errorf("client %d: release after the last fault: %v", i, err)
				}
			}
		})
	}
	t.spawned.Wait()
	t.Logf("%d locks under faults, %d of them lost", used.Load(), lost.Load())
	if used.Load() < believers {
		t.Errorf("%d clients have got only %d locks under faults: too few to show anything", believers, used.Load())
	}
	for _, r := range resources {
		r.check(t)
	}
}

// spawnIn is spawn for a goroutine that the row waits for too.
func (t *trial) spawnIn(group *sync.WaitGroup, f func()) {
	group.Add(1)
	t.spawn(func() {
		defer group.Done()
		f()
	})
}

// injectFaults heals the link, or breaks it in one more way, every 50 to 500 ms until ctx ends. Without a fault for
// about half of the time there is work to disturb.
func (t *trial) injectFaults(ctx context.Context, net *Network) {
	faults := []func(){
		net.Hang,
		func() { net.Cut() },
		func() { net.Delay(rand.N(t.TTL/4), rand.N(t.TTL/4)) },
	}
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 {
		faults = append(faults, net.Reset)
	}
	defer net.Heal()
	for sometimes(ctx, 50*time.Millisecond, 500*time.Millisecond) {
		if rand.N(2) == 0 {
			net.Heal()
			continue
		}
		faults[rand.N(len(faults))]()
		if rand.N(3) == 0 {
			sometimes(ctx, t.TTL, t.TTL+t.TTL/4) // long enough to lose a lock
		}
	}
}

// sometimes lets a random time pass, and is false if ctx ends meanwhile.
func sometimes(ctx context.Context, least, most time.Duration) bool {
	timer := time.NewTimer(least + rand.N(most-least))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
