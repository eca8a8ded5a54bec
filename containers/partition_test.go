package main

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/redistest"
)

// parted is the link of a client to several servers, of which it may stop to reach the far ones.
type parted struct {
	near, far *conformance.Network
	isNear    map[string]bool // by address
}

func newParted(t *testing.T, near ...string) *parted {
	t.Helper()
	p := &parted{near: conformance.NewNetwork(), far: conformance.NewNetwork(), isNear: map[string]bool{}}
	for _, addr := range near {
		p.isNear[addr] = true
	}
	t.Cleanup(func() {
		if err := errors.Join(p.near.Close(), p.far.Close()); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *parted) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if p.isNear[addr] {
		return p.near.DialContext(ctx, network, addr)
	}
	return p.far.DialContext(ctx, network, addr)
}

func open(t *testing.T, rawURL string, cfg locker.Config) locker.Locker {
	t.Helper()
	l, err := locker.OpenLocker(t.Context(), rawURL, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

// TestRedlockMinority is about a client that reaches two of five servers. All of them work, and others reach them all.
func TestRedlockMinority(t *testing.T) {
	t.Parallel()
	group := startRedlock(t, 5)
	const prefix = "minority:"
	redistest.Remember(t, group, prefix)
	link := newParted(t, group.Members[0].Addr, group.Members[1].Addr)
	minority(t, group.URL+"?prefix="+prefix, link, link.far.Cut, link.far.Heal)
}

// TestEtcdMinority is about a client that reaches nobody but the leader, which the other members do not reach any more.
func TestEtcdMinority(t *testing.T) {
	t.Parallel()
	cluster := startEtcdCluster(t)
	leader, err := cluster.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	link := newParted(t, cluster.Members[leader].Addr)
	minority(t, cluster.URL+"/minority/", link,
		func(...string) {
			link.far.Cut()
			if err := cluster.isolate(t.Context(), leader); err != nil {
				t.Fatal(err)
			}
		},
		func() {
			if err := cluster.rejoin(t.Context(), leader); err != nil {
				t.Fatal(err)
			}
			link.far.Heal()
		})
}

// minority cuts a client that holds a lock off from most servers. It must be told before anybody else can be granted the lock, be granted
// nothing, and go on when it reaches them again.
func minority(t *testing.T, rawURL string, link *parted, cut func(...string), heal func()) {
	t.Helper()
	const ttl = 2 * time.Second
	client, err := locker.New(open(t, rawURL, locker.Config{Dial: link.dial}), locker.WithTTL(ttl), locker.WithReleaseTimeout(ttl))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() }) // what is lost cannot be released
	observer := open(t, rawURL, locker.Config{})

	lock, err := client.Acquire(t.Context(), "invoice")
	if err != nil {
		t.Fatal(err)
	}
	cut()
	next, granted := takeOver(t, observer, "invoice")
	lost, deadline := lock.Err(), lock.Deadline()
	if !errors.Is(lost, locker.ErrLost) {
		t.Errorf("the lock was granted to another while Err of its holder is %v", lost)
	}
	if early := deadline.Sub(granted); early > 0 {
		t.Errorf("the lock was granted to another %v before the deadline of its holder", early)
	}
	if next.Token <= lock.Token() {
		t.Errorf("token %d follows %d", next.Token, lock.Token())
	}
	if _, err := client.Acquire(t.Context(), "free", locker.WithWait(ttl)); err == nil {
		t.Error("a client that reaches a minority only was granted a lock")
	}
	if err := observer.Release(t.Context(), next); err != nil {
		t.Error(err)
	}

	heal()
	for _, key := range []string{"invoice", "free"} {
		again, err := client.Acquire(t.Context(), key, locker.WithWait(30*time.Second))
		if err != nil {
			t.Fatalf("acquire of a free lock after the partition: %v", err)
		}
		if key == "invoice" && again.Token() <= next.Token {
			t.Errorf("token %d follows %d", again.Token(), next.Token)
		}
		if err := again.Release(t.Context()); err != nil {
			t.Errorf("release after the partition: %v", err)
		}
	}
}

// takeOver asks for a key until it is granted, although calls fail meanwhile.
func takeOver(t *testing.T, observer locker.Locker, key string) (lease locker.Lease, granted time.Time) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; {
		req := locker.Request{Key: key, ID: uuid.NewString(), TTL: time.Minute, NoWait: true}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		lease, err := observer.Acquire(ctx, req)
		granted := time.Now()
		if err == nil {
			cancel()
			return lease, granted
		}
		if !errors.Is(err, locker.ErrHeld) {
			_ = observer.Release(ctx, locker.Lease{Key: key, ID: req.ID}) // a grant whose answer was lost would stand in the way
		}
		cancel()
		if granted.After(end) {
			t.Fatalf("the lock of a client that reaches a minority only is not granted to another: %v", err)
		}
		time.Sleep(5 * time.Millisecond) // poll
	}
}
