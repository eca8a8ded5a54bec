package redisbackend_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

func TestClusterURLs(t *testing.T) {
	t.Parallel()
	for rawURL, word := range map[string]string{
		"redis+cluster://u:s3cret@h1,h2/1":             "a cluster has no databases but 0",
		"redis+cluster:///":                            "names no servers",
		"redis+cluster://h1?pasword=s3cret":            "known are ca, dial_timeout, pool_size, prefix, replicas",
		"redis+cluster://h1?ca=x":                      "write rediss+cluster://",
		"rediss+cluster://h1?ca=/does/not/exist":       "/does/not/exist",
		"redis+cluster://h1?replicas=-1":               "replicas must be a number from 0",
		"redis+cluster://u:s3cret@127.0.0.1:1,[::1]:1": "no server of the cluster tells who has which keys",
	} {
		refuses(t, rawURL, word)
	}
}

func TestWrongClusters(t *testing.T) {
	t.Parallel()
	refuses(t, "redis+cluster://"+start(t).Addr, "the server is not one of a cluster: write redis://")
	cluster := servertest.Cluster(t, "s3cret")
	addr := cluster.Members[0].Addr
	refuses(t, "redis+cluster://"+addr, "wants a password")
	refuses(t, "redis+cluster://:s3cret2@"+addr, "refuses this user or password")

	alone := open(t, "redis://:s3cret@"+addr)
	eventually(t, "somebody who uses one server of a cluster is told", func() bool {
		_, err := alone.Acquire(t.Context(), try(rand.Text()))
		return err != nil && strings.Contains(err.Error(), "write redis+cluster://")
	})

	// Any one that can be reached is enough, also a replica.
	l := open(t, "redis+cluster://:s3cret@127.0.0.1:1,"+cluster.Members[5].Addr)
	for i := range 9 {
		release(t, l, acquire(t, l, request(fmt.Sprint(i))))
	}

	// A shard that is down altogether, and with it the whole cluster.
	if err := errors.Join(cluster.Members[1].Kill(t.Context()), cluster.Members[4].Kill(t.Context())); err != nil {
		t.Fatal(err)
	}
	admin := redis.NewClient(&redis.Options{Addr: addr, Password: "s3cret"})
	defer admin.Close()
	eventually(t, "the cluster is down", func() bool {
		return strings.Contains(admin.ClusterInfo(t.Context()).Val(), "cluster_state:fail")
	})
	refuses(t, cluster.URL, "the cluster is down")
	began := time.Now()
	_, err := l.Acquire(t.Context(), request("k"))
	if took := time.Since(began); err == nil || errors.Is(err, locker.ErrHeld) || took > 7*time.Second {
		t.Errorf("acquire after %v: %v", took, err)
	}
}

func TestSlots(t *testing.T) {
	t.Parallel()
	cluster := servertest.Cluster(t, "")
	for _, key := range []string{"locker:{k}", "app:{invoice/42}", "{ä%7B%7D}", "locker:{" + strings.Repeat("x", 500) + "}:seen"} {
		slot, err := cluster.SlotOf(t.Context(), key)
		if err != nil || slot != redisbackend.SlotOf(key) {
			t.Errorf("the slot of %q is %d, want %d (%v)", key, redisbackend.SlotOf(key), slot, err)
		}
	}

	// A client of go-redis is as good as a URL, and stays open.
	client := redistest.DirectCluster(t, cluster)
	l, err := redisbackend.New(t.Context(), client, redisbackend.Options{Replicas: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if early := l.Capabilities().EarlyFree; early != locker.EarlyFreeRestart {
		t.Errorf("with all replicas demanded EarlyFree is %v", early)
	}
	other := open(t, cluster.URL)
	if early := other.Capabilities().EarlyFree; early != locker.EarlyFreeRestart|locker.EarlyFreeFailover {
		t.Errorf("without replicas EarlyFree is %v", early)
	}

	// Locks on all servers, which wake those who wait elsewhere.
	leases := make(map[string]locker.Lease)
	for i := range 30 {
		key := fmt.Sprint("key ", i)
		leases[key] = acquire(t, l, request(key))
	}
	listed := make(map[string]bool)
	for h, err := range other.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		listed[h.Key] = h.Token == leases[h.Key].Token
	}
	if !maps.Equal(listed, maps.Collect(func(yield func(string, bool) bool) {
		for key := range leases {
			if !yield(key, true) {
				return
			}
		}
	})) {
		t.Errorf("List tells of %v", listed)
	}
	var all sync.WaitGroup
	for key, lease := range leases {
		waiting := wait(t.Context(), t, other, request(key), 1)
		all.Go(func() {
			if _, err := l.Extend(t.Context(), lease); err != nil {
				t.Errorf("extend: %v", err)
			}
			released := time.Now()
			release(t, l, lease)
			next := granted(t, waiting, 10*time.Second)
			if took := next.at.Sub(released); took > time.Second {
				t.Errorf("%s was handed over in %v: not by a message", key, took)
			}
			release(t, other, next.lease)
		})
	}
	all.Wait()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := client.Ping(t.Context()).Err(); err != nil {
		t.Errorf("the caller's client after Close: %v", err)
	}
}

// A primary that hangs holds up nothing but its own locks.
func TestClusterHungServer(t *testing.T) {
	t.Parallel()
	cluster := servertest.Cluster(t, "")
	l := open(t, cluster.URL)
	leases := make(map[int][]locker.Lease)
	for i := range 60 {
		lease := acquire(t, l, request(fmt.Sprint(i)))
		owner := redisbackend.SlotOf("locker:{"+lease.Key+"}") * 3 / 16384
		leases[owner] = append(leases[owner], lease)
	}
	if err := cluster.Members[1].Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // no replica has taken over by then
	defer cancel()
	var all sync.WaitGroup
	for owner, some := range leases {
		for _, lease := range some {
			all.Go(func() {
				began := time.Now()
				_, err := l.Extend(ctx, lease)
				if owner != 1 && (err != nil || time.Since(began) > 700*time.Millisecond) {
					t.Errorf("extend beside a server that hangs took %v: %v", time.Since(began), err)
				}
			})
		}
	}
	all.Wait()
	slot := redisbackend.SlotOf("locker:{" + leases[1][0].Key + "}")
	if owner, err := cluster.Owner(t.Context(), slot); err != nil || owner != 4 {
		t.Fatalf("the slots are those of member %d: %v", owner, err)
	}
	eventually(t, "the replica that has taken over is found", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // as a heartbeat, which does not wait for its last try
		defer cancel()
		_, err := l.Extend(ctx, leases[1][0])
		return err == nil
	})
	if err := cluster.Members[1].Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Nobody sees that slots are being moved.
func TestClusterResharding(t *testing.T) {
	t.Parallel()
	cluster := servertest.Cluster(t, "")
	l, other := open(t, cluster.URL), open(t, cluster.URL)
	const key = "k"
	slot := redisbackend.SlotOf("locker:{" + key + "}")
	fresh := sameSlot(slot, 12) // locks in the same slot, that are new in each phase
	held := acquire(t, l, request(key))
	waiting := wait(t.Context(), t, other, request(key), 1)
	queued := acquire(t, l, request(fresh[0]))
	ctx, cancel := context.WithCancel(t.Context())
	quitter := wait(ctx, t, other, request(fresh[0]), 1)

	// A heartbeat goes on through all phases.
	client, err := locker.New(l, locker.WithTTL(3*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	beating, err := client.Acquire(t.Context(), fresh[1])
	if err != nil {
		t.Fatal(err)
	}

	from, err := cluster.Owner(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	next := 2
	works := func(phase string) {
		t.Helper()
		for range 2 {
			lease, err := l.Acquire(t.Context(), request(fresh[next]))
			if err == nil {
				lease, err = l.Extend(t.Context(), lease)
			}
			if err != nil {
				t.Errorf("%s: a new lock: %v", phase, err)
				return
			}
			if _, err := other.Acquire(t.Context(), try(fresh[next])); !errors.Is(err, locker.ErrHeld) {
				t.Errorf("%s: a lock that is held: %v", phase, err)
			}
			if err := l.Release(t.Context(), lease); err != nil {
				t.Errorf("%s: release: %v", phase, err)
			}
			next++
		}
		extended, err := l.Extend(t.Context(), held)
		if err != nil {
			t.Errorf("%s: extend: %v", phase, err)
			return
		}
		held = extended
		if _, err := other.Inspect(t.Context(), fresh[next-1]); err != nil {
			t.Errorf("%s: inspect: %v", phase, err)
		}
	}

	resharding, err := cluster.Reshard(t.Context(), slot, (from+1)%3)
	if err != nil {
		t.Fatal(err)
	}
	works("nothing is moved yet")
	// The state first, without the queue: those who wait must not begin another one on the other side.
	if err := resharding.Move(t.Context(), "locker:{"+key+"}", "locker:{"+fresh[0]+"}"); err != nil {
		t.Fatal(err)
	}
	works("the locks are moved, and their queues are not")
	rest(t.Context(), 2*time.Second) // those who wait have polled
	// What is released in between is handed over in the end.
	release(t, l, queued)
	if err := resharding.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	works("all is moved")
	cancel()
	if a := <-quitter; a.err == nil {
		release(t, other, a.lease)
	}
	release(t, l, held)
	last := granted(t, waiting, 10*time.Second)
	if last.lease.Token <= held.Token {
		t.Errorf("token %d follows %d", last.lease.Token, held.Token)
	}
	release(t, other, last.lease)
	if err := beating.Err(); err != nil {
		t.Errorf("the lock with a heartbeat: %v", err)
	}
	if err := beating.Release(t.Context()); err != nil {
		t.Errorf("release: %v", err)
	}
	acquire(t, l, try(fresh[0]))
}

// sameSlot makes names of locks in a slot.
func sameSlot(slot, n int) (keys []string) {
	for i := 0; len(keys) < n; i++ {
		if key := fmt.Sprint("same", i); redisbackend.SlotOf("locker:{"+key+"}") == slot {
			keys = append(keys, key)
		}
	}
	return keys
}

// A replica takes over from a primary that was killed. Locks that it had confirmed stay held, and those who wait go on waiting.
func TestClusterFailover(t *testing.T) {
	t.Parallel()
	for _, params := range []string{"?replicas=1", ""} {
		t.Run(params, func(t *testing.T) {
			t.Parallel()
			cluster := servertest.Cluster(t, "")
			l, other := open(t, cluster.URL+params), open(t, cluster.URL+params)
			client, err := locker.New(l, locker.WithTTL(20*time.Second))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = client.Close() })
			lock, err := client.Acquire(t.Context(), "k")
			if err != nil {
				t.Fatal(err)
			}
			waiting := wait(t.Context(), t, other, request("k"), 1)
			slot := redisbackend.SlotOf("locker:{k}")
			owner, err := cluster.Owner(t.Context(), slot)
			if err != nil {
				t.Fatal(err)
			}
			if err := cluster.Members[owner].Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			// Calls wait for it, as long as they have time.
			began := time.Now()
			err = lock.Extend(t.Context())
			took := time.Since(began).Round(time.Millisecond)
			switch {
			case params != "" && (err == nil || errors.Is(err, locker.ErrLost)):
				t.Errorf("extend without the replica that must confirm, after %v: %v", took, err)
			case params == "" && err != nil:
				t.Errorf("extend after %v: %v", took, err)
			}
			if next, err := cluster.Owner(t.Context(), slot); err != nil || next == owner {
				t.Fatalf("the slots are those of member %d: %v", next, err)
			}
			if err := cluster.Members[owner].Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := cluster.Complete(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := lock.Extend(t.Context()); err != nil {
				t.Errorf("extend when the old primary is a replica: %v", err)
			}
			eventually(t, "the request waits at the new primary", func() bool { return waiters(t, other, "k") == 1 })
			if err := lock.Release(t.Context()); err != nil {
				t.Errorf("release: %v", err)
			}
			next := granted(t, waiting, 10*time.Second)
			if next.lease.Token <= lock.Token() {
				t.Errorf("token %d follows %d", next.lease.Token, lock.Token())
			}
			release(t, other, next.lease)
		})
	}
}

// A holder that still reaches a primary which was cut off from all other servers. With the replica's confirmation demanded it is told
// before another is granted the lock, else by its deadline: such a primary stops by itself.
func TestClusterIsolatedPrimary(t *testing.T) {
	t.Parallel()
	for _, params := range []string{"?replicas=1", ""} {
		t.Run(params, func(t *testing.T) {
			t.Parallel()
			const ttl = 2 * time.Second
			cluster := servertest.Cluster(t, "")
			slot := redisbackend.SlotOf("locker:{k}")
			owner, err := cluster.Owner(t.Context(), slot)
			if err != nil {
				t.Fatal(err)
			}
			old := cluster.Members[owner]
			isolated := make(chan struct{})
			dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
				var d net.Dialer
				select {
				case <-isolated:
					if addr == old.Addr {
						return d.DialContext(ctx, "unix", old.Socket)
					}
					return nil, errors.New("the other side of a partition")
				default:
					return d.DialContext(ctx, network, addr)
				}
			}
			client, err := locker.New(openConfig(t, cluster.URL+params, locker.Config{Dial: dial}), locker.WithTTL(ttl))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = client.Close() })
			lock, err := client.Acquire(t.Context(), "k")
			if err != nil {
				t.Fatal(err)
			}
			close(isolated)
			if err := cluster.Isolate(t.Context(), owner); err != nil {
				t.Fatal(err)
			}
			if next, err := cluster.Owner(t.Context(), slot); err != nil || next == owner {
				t.Fatalf("the slot is that of member %d: %v", next, err)
			}
			next := acquire(t, open(t, cluster.URL), request("k"))
			granted, told := time.Now(), lock.Err()
			if params != "" && told == nil {
				t.Errorf("another has been granted the lock, and the holder trusts it for another %v", time.Until(lock.Deadline()))
			}
			if next.Token <= lock.Token() {
				t.Errorf("token %d follows %d", next.Token, lock.Token())
			}
			eventually(t, "the holder is told", func() bool { return lock.Err() != nil })
			t.Logf("told %v after another was granted the lock", time.Since(granted))
		})
	}
}
