package conformance

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var waitingRows = []row{
	{
		name:   "handover",
		clause: "Where Capabilities.Notifies, a release wakes the next waiter at once.",
		alone:  true,
		run:    handover,
	},
	{
		name:   "lost-wakeup",
		clause: "A wake-up that is lost delays the waiter by no more than Capabilities.Fallback.",
		run:    lostWakeup,
	},
	{
		name:   "vanished-holder",
		clause: "A waiter gets the lock of a holder that has vanished when its TTL is over, and not before.",
		run:    vanishedHolder,
	},
	{
		name: "fair",
		clause: "Where Capabilities.Fair, clients are granted a key in the order in which they began to wait; elsewhere " +
			"nobody starves.",
		run: fair,
	},
	{
		name: "one-remote-waiter",
		clause: "Of all goroutines of a Client that want a key one waits at the server; they are served in the order of " +
			"their calls.",
		run: oneRemoteWaiter,
	},
	{
		name:   "small-pool",
		clause: "Waiters never use up the connections that a held lock needs for its heartbeat.",
		run:    smallPool,
	},
}

// grant is what a waiter got, and when.
type grant struct {
	lease locker.Lease
	at    time.Time
}

// queueUp makes l wait for a key that is held, as the n-th at the server.
func (t *trial) queueUp(l locker.Locker, net *Network, observer locker.Locker, key string, n int) (granted <-chan grant) {
	got := make(chan grant, 1)
	before := asked(net)
	t.spawn(func() {
		lease, err := l.Acquire(t.ctx, t.request(key))
		at := time.Now()
		switch {
		case err == nil:
			got <- grant{lease, at}
		case t.ctx.Err() == nil:
			t.Errorf("waiting for %q: %v", key, err)
		}
	})
	t.waiting(observer, key, n, before)
	return got
}

func handover(t *trial) {
	const handovers, rounds = 50, 3
	if !t.caps.Notifies {
		t.Skipf("the backend says that it does not notify")
	}
	holder, holderNet := t.open()
	next, nextNet := t.open()
	observer, _ := t.open()
	key := t.key("")
	lease := t.acquire(holder, key, ttl(long))
	// Beside each handover a plain call is timed, which the same machine makes slow at the same time.
	round := func() (took, calls []time.Duration) {
		for range handovers {
			granted := t.queueUp(next, nextNet, observer, key, 1)
			asked := time.Now()
			t.mustBeHeld(observer, key)
			calls = append(calls, time.Since(asked))
			released := time.Now()
			t.release(holder, lease)
			g := receive(t, granted, t.freed(), "a waiter gets the key that was released")
			took, lease = append(took, g.at.Sub(released)), g.lease
			holder, holderNet, next, nextNet = next, nextNet, holder, holderNet
		}
		slices.Sort(took)
		slices.Sort(calls)
		return took, calls
	}
	// A machine that is busy makes some handovers slow, or all of them for a while. A backend that polls is slow
	// always: what half of them may take does not grow with the slack.
	const atOnce = 20 * time.Millisecond
	for range rounds {
		took, calls := round()
		usual, most := 3*calls[handovers/2]+atOnce, 3*t.rtt+t.slack
		if took[handovers/2] <= usual && took[handovers-2] <= most {
			return
		}
		t.Logf("half of %d handovers took %v or more, and two %v or more; beside calls of %v the most is %v and %v",
			handovers, took[handovers/2], took[handovers-2], calls[handovers/2], usual, most)
	}
	t.Errorf("handovers were too slow %d times", rounds)
}

func lostWakeup(t *trial) {
	const label = "notify"
	if !t.caps.Notifies {
		t.Skipf("the backend says that it does not notify")
	}
	a, _ := t.open()
	b, net := t.open()
	observer, _ := t.open()
	key := t.key("")
	lease := t.acquire(a, key, ttl(long))
	granted := t.queueUp(b, net, observer, key, 1)
	if !poll(t.soon(), func() bool { return net.Has(label) }) {
		t.Skipf("no connection of a waiter has the label %q: wake-ups cannot be lost alone", label)
	}
	net.Cut(label)
	t.release(a, lease)
	receive(t, granted, cmp.Or(t.caps.Fallback, t.freed())+t.slack, "a waiter whose wake-up is lost gets the key that was released")
}

func vanishedHolder(t *trial) {
	a, net := t.open()
	b, waiterNet := t.open()
	observer, _ := t.open()
	key := t.key("")
	lease := t.acquire(a, key)
	granted := t.queueUp(b, waiterNet, observer, key, 1)
	net.Cut()
	g := receive(t, granted, time.Until(lease.Start.Add(t.freed())), "a waiter gets the key of a holder that has vanished")
	if early := kept(lease).Sub(g.at); early > 0 {
		t.Errorf("the waiter got the key %v before the TTL of %v was over", early, lease.TTL)
	}
}

func fair(t *trial) {
	if !t.caps.Fair {
		nobodyStarves(t)
		return
	}
	const waiters = 20
	holder, _ := t.open()
	observer, _ := t.open()
	key := t.key("")
	lease := t.acquire(holder, key, ttl(long))
	tokens := make([]uint64, waiters)
	var served atomic.Int64
	for n := range waiters {
		l, net := t.open()
		granted := t.queueUp(l, net, observer, key, n+1)
		t.spawn(func() {
			g := receive(t, granted, t.watchdog(), "a waiter gets the key")
			tokens[n] = g.lease.Token
			served.Add(1)
			t.release(l, g.lease)
		})
	}
	t.release(holder, lease)
	// Who asks once comes after those who wait.
	for served.Load() < waiters && !t.failed() && sometimes(t.ctx, 0, time.Millisecond) {
		if lease, held := t.try(observer, key); !held {
			if n := served.Load(); n < waiters {
				t.Errorf("a request with NoWait was granted the key while %d others waited", waiters-n)
			}
			t.release(observer, lease)
		}
	}
	t.spawned.Wait()
	for n := 1; n < waiters; n++ {
		if tokens[n] <= tokens[n-1] {
			t.Fatalf("the tokens of the waiters, in the order in which they began to wait: %d", tokens)
		}
	}
}

// nobodyStarves lets 5 clients use a key for a moment, come back soon after, and fails the row if one of them waits
// while the others get it 100 times.
func nobodyStarves(t *trial) {
	const (
		clients = 5
		most    = 100
		moment  = 2 * time.Millisecond
	)
	key := t.key("")
	var grants atomic.Int64
	for i := range clients {
		l, _ := t.open()
		last := int64(0)
		t.spawn(func() {
			for grants.Load() < 2*most {
				lease, err := l.Acquire(t.ctx, t.request(key))
				if err != nil {
					t.Fatalf("client %d: %v", i+1, err)
				}
				now := grants.Add(1)
				if others := now - last - 1; others > most {
					t.Errorf("client %d waited while others got the key %d times", i+1, others)
				}
				last = now
				t.pass(rand.N(moment))
				t.release(l, lease)
				t.pass(moment + rand.N(moment))
			}
		})
	}
	t.spawned.Wait()
}

func oneRemoteWaiter(t *trial) {
	const goroutines = 100
	holder, _ := t.client()
	client, net := t.client()
	observer, _ := t.open()
	key := t.key("")
	lock, err := holder.Acquire(t.ctx, key)
	if err != nil {
		t.Fatalf("acquire %q, which is free: %v", key, err)
	}
	var called [goroutines]time.Time
	var mu sync.Mutex
	var served []int
	requests := net.Naming(key)
	for i := range goroutines {
		calling := make(chan struct{})
		t.spawn(func() {
			called[i] = time.Now()
			close(calling)
			lock, err := client.Acquire(t.ctx, key)
			if err != nil {
				t.Fatalf("goroutine %d: %v", i, err)
			}
			mu.Lock()
			served = append(served, i)
			mu.Unlock()
			if err := lock.Release(t.ctx); err != nil {
				t.Errorf("goroutine %d: release: %v", i, err)
			}
		})
		<-calling
		t.pass(t.slack / 20)
	}
	if waiters := t.inspect(observer, key).Waiters; waiters > 1 {
		t.Errorf("the server sees %d waiters of one Client; it should see one", waiters)
	}
	if asked := requests(); asked > goroutines/2 {
		t.Errorf("%d goroutines of one Client have sent %d requests for a key that is held", goroutines, asked)
	}
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release: %v", err)
	}
	t.spawned.Wait()
	// Nobody sees from outside when a goroutine has begun to wait, so only calls that are far apart count.
	for n, i := range served {
		for _, j := range served[n+1:] {
			if earlier := called[i].Sub(called[j]); earlier > 2*t.slack {
				t.Fatalf("goroutine %d was served before goroutine %d, which had called %v earlier", i, j, earlier)
			}
		}
	}
}

func smallPool(t *trial) {
	const waiters = 50
	others, _ := t.client()
	l := t.openSmall()
	client := t.clientOf(l)
	lock, err := client.Acquire(t.ctx, t.key("held"))
	if err != nil {
		t.Fatalf("acquire of a free key: %v", err)
	}
	locks := make([]*locker.Lock, waiters)
	t.parallel(waiters, func(i int) {
		lock, err := others.Acquire(t.ctx, t.key(strconv.Itoa(i)))
		if err != nil {
			t.Fatalf("acquire of a free key: %v", err)
		}
		locks[i] = lock
	})
	for i := range waiters {
		t.spawn(func() {
			lock, err := client.Acquire(t.ctx, t.key(strconv.Itoa(i)))
			if err != nil {
				t.Errorf("waiter %d: %v", i, err)
				return
			}
			if err := lock.Release(t.ctx); err != nil {
				t.Errorf("waiter %d: release: %v", i, err)
			}
		})
	}
	// Each renewal comes a third of the TTL after the last; the next try, if one is not answered, would come after
	// a half.
	least := t.TTL/2 - t.margin() - t.slack
	for over := time.Now().Add(3 * t.TTL); time.Now().Before(over); t.pass(t.TTL / 50) {
		left := time.Until(lock.Deadline())
		if err := lock.Err(); err != nil || left < least {
			t.Errorf("while %d requests for other keys wait a heartbeat is missing: the lock has %v left (%v), and should never have less than %v",
				waiters, left, err, least)
			break
		}
	}
	for _, lock := range locks {
		if err := lock.Release(t.ctx); err != nil {
			t.Errorf("release: %v", err)
		}
	}
	t.spawned.Wait()
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release: %v", err)
	}
}

// openSmall is open with the fewest connections that the backend works with.
func (t *trial) openSmall() locker.Locker {
	if t.Small == nil {
		l, _ := t.open()
		return l
	}
	net := t.network()
	l, err := t.Small(t.ctx, net)
	if err != nil {
		t.Fatalf("open with few connections: %v", err)
	}
	t.cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing a Locker after the row: %v", err)
		}
	})
	return l
}
