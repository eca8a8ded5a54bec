package pgbackend_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// TestReleaseOpensTheGate releases a lock that was waited for before the waiter's link has carried the message that opens the
// gate. When Release answers, others must be able to have the lock.
func TestReleaseOpensTheGate(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	first, observer := open(t, rawURL), open(t, rawURL)
	var slow atomic.Bool
	second := tap(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
		if c.role == "wait" && slow.Load() {
			time.Sleep(200 * time.Millisecond) // the link's own time
		}
		return p, nil
	})
	lease := acquire(t, first, request("k"))
	waiting := waitAtServer(t, second, request("k"))
	slow.Store(true)
	release(t, first, lease)
	release(t, second, granted(t, waiting))
	lease, err := observer.Acquire(t.Context(), try("k"))
	if errors.Is(err, locker.ErrHeld) {
		t.Fatal("the lock is held when its Release has answered")
	}
	if err != nil {
		t.Fatal(err)
	}
	release(t, observer, lease)
}

// TestCreateIndexConcurrently does, as the work under a lock, what waits for every transaction that is older than itself, while
// others wait for the lock: of this process and of another, for this key and, taking turns, for more keys than there are waiters.
func TestCreateIndexConcurrently(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	holder, same, other := open(t, rawURL), open(t, rawURL), open(t, rawURL)
	work := direct(t, rawURL)
	if _, err := work.Exec(t.Context(), "CREATE TABLE indexed (n int); INSERT INTO indexed SELECT generate_series(1, 1000)"); err != nil {
		t.Fatal(err)
	}
	var leases []locker.Lease
	var waiting []<-chan answer
	for i := range 10 {
		key := fmt.Sprint("k", i)
		leases = append(leases, acquire(t, holder, request(key)))
		waiting = append(waiting, wait(t.Context(), same, request(key)), wait(t.Context(), other, request(key)))
	}
	for i := range 10 {
		eventually(t, "the requests wait at the server", func() bool { return waiters(t, holder, fmt.Sprint("k", i)) > 0 })
	}
	for i := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		began := time.Now()
		_, err := work.Exec(ctx, fmt.Sprintf("CREATE INDEX CONCURRENTLY indexed_%d ON indexed (n)", i))
		cancel()
		if err != nil {
			t.Fatalf("CREATE INDEX CONCURRENTLY under the lock: %v", err)
		}
		t.Logf("CREATE INDEX CONCURRENTLY took %v", time.Since(began))
	}
	for _, lease := range leases {
		release(t, holder, lease)
	}
	for i := range 10 {
		first, second := waiting[2*i], waiting[2*i+1]
		select {
		case a := <-first:
			release(t, same, a.lease)
			release(t, other, granted(t, second))
		case a := <-second:
			release(t, other, a.lease)
			release(t, same, granted(t, first))
		case <-time.After(10 * time.Second):
			t.Fatalf("nobody was granted k%d", i)
		}
	}
}

// TestWaitersAreFew lets 200 requests wait for 100 keys on 2 sessions.
func TestWaitersAreFew(t *testing.T) {
	t.Parallel()
	const keys = 100
	rawURL := shared(t) + "&waiters=2&application_name=few"
	holder, l := open(t, shared(t)), open(t, rawURL)
	look := direct(t, shared(t))
	var leases []locker.Lease
	var waiting []<-chan answer
	for i := range keys {
		leases = append(leases, acquire(t, holder, request(strconv.Itoa(i))))
	}
	ctx, cancel := context.WithCancel(t.Context())
	for i := range 2 * keys {
		waiting = append(waiting, wait(ctx, l, request(strconv.Itoa(i%keys))))
	}
	sessions := func() []string {
		return ask(t, look, "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'locker % few'")
	}
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got := sessions(); len(got) > 4 {
			t.Fatalf("%d requests wait on %q: want 2 sessions that wait, one that could hold, and one to manage them", 2*keys, got)
		}
	}
	began := time.Now()
	release(t, holder, leases[keys-1]) // the waiters have many other keys to wait for
	var lease locker.Lease
	select {
	case a := <-waiting[keys-1]:
		lease = a.lease
	case a := <-waiting[2*keys-1]:
		lease = a.lease
	case <-time.After(10 * time.Second):
		t.Fatal("a key that is free was granted to nobody")
	}
	t.Logf("with %d keys for each waiter a release was found after %v", keys/2, time.Since(began))
	release(t, l, lease)
	cancel()
	for i, answered := range waiting {
		if i%keys == keys-1 {
			continue // one of the two has it
		}
		if a := <-answered; !errors.Is(a.err, context.Canceled) {
			t.Fatalf("a cancelled wait: %v", a.err)
		}
	}
}

// TestSlowSetUp has all sessions wait for longer than the TTL between their opening and their first statement.
func TestSlowSetUp(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	const ttl = 500 * time.Millisecond
	holder := open(t, rawURL)
	l := tap(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
		if strings.Contains(string(p), "backend_start") { // the first
			time.Sleep(gateIdle + 100*time.Millisecond)
		}
		return p, nil
	})
	release(t, l, acquire(t, l, lasting(request("free"), ttl)))
	lease := acquire(t, holder, request("held"))
	waiting := waitAtServer(t, l, lasting(request("held"), ttl))
	release(t, holder, lease)
	release(t, l, granted(t, waiting))
}

// gateIdle is the time after which a session that waits must not be idle.
const gateIdle = 700 * time.Millisecond
