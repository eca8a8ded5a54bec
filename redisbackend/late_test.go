package redisbackend_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

// twoLinks opens a Backend whose new connections go over the second link from the moment that the returned function is
// called, so that requests which the first one holds can land late while the Backend works on.
func twoLinks(t *testing.T, server *servertest.Server) (b *redisbackend.Backend, first *conformance.Network, useSecond func()) {
	t.Helper()
	first, second := conformance.NewNetwork(), conformance.NewNetwork()
	t.Cleanup(func() { _ = errors.Join(first.Close(), second.Close()) })
	var switched atomic.Bool
	b = openConfig(t, server.URL, locker.Config{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if switched.Load() {
			return second.DialContext(ctx, network, addr)
		}
		return first.DialContext(ctx, network, addr)
	}})
	return b, first, func() { switched.Store(true) }
}

// land delivers what the link holds, and waits until the server has dealt with it.
func land(t *testing.T, link *conformance.Network) {
	t.Helper()
	if err := link.Land(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A poll that hung is sent again, and one copy is granted. When the lease has expired the other copy lands.
func TestLateCopyAfterTheLeaseExpired(t *testing.T) {
	t.Parallel()
	server := start(t)
	b, link, useSecond := twoLinks(t, server)
	other := open(t, server.URL)
	short := try("k")
	short.TTL = 1200 * time.Millisecond
	acquire(t, other, short)

	req := request("k")
	req.TTL = time.Second
	answer := make(chan locker.Lease, 1)
	go func() {
		lease, err := b.Acquire(t.Context(), req)
		if err != nil {
			t.Error(err)
		}
		answer <- lease
	}()
	eventually(t, "the request waits", func() bool { return waiters(t, other, "k") == 1 })
	link.Hold()
	useSecond()
	lease := <-answer
	if t.Failed() {
		t.FailNow()
	}

	var next locker.Lease
	eventually(t, "the lease has expired", func() (free bool) {
		var err error
		next, err = other.Acquire(t.Context(), try("k"))
		return err == nil
	})
	release(t, other, next)
	land(t, link)
	if held, err := other.Inspect(t.Context(), "k"); err != nil || held.ID == req.ID {
		t.Errorf("the request was granted twice: %+v, %v", held, err)
	}
	if _, err := b.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend of the lost lease: %v", err)
	}
	if err := b.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release of the lost lease: %v", err)
	}
}

// A request is made once more under its old ID because the first call failed; the first one lands after the release.
func TestLateCopyOfARepeatedRequest(t *testing.T) {
	t.Parallel()
	server := start(t)
	b, link, useSecond := twoLinks(t, server)
	other := open(t, server.URL)
	req := try("k")
	link.Hold()
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if _, err := b.Acquire(ctx, req); err == nil {
		t.Fatal("granted over a link that holds all requests")
	}
	useSecond()
	var lease locker.Lease
	eventually(t, "the request is granted over another connection", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var err error
		lease, err = b.Acquire(ctx, req)
		return err == nil
	})
	release(t, b, lease)
	release(t, b, acquire(t, b, try("k"))) // the next holder, of the same Backend
	land(t, link)
	if held, err := other.Inspect(t.Context(), "k"); err != nil || held.ID == req.ID {
		t.Errorf("a released request holds the lock: %+v, %v", held, err)
	}
}

// A client library repeats a request by itself, and nobody else knows of it; the first copy lands after the release.
func TestLateCopyByAClientThatRetries(t *testing.T) {
	t.Parallel()
	server := start(t)
	first, second := conformance.NewNetwork(), conformance.NewNetwork()
	t.Cleanup(func() { _ = errors.Join(first.Close(), second.Close()) })
	var switched atomic.Bool
	client := redis.NewClient(&redis.Options{
		Addr: server.Addr, MaxRetries: 3, ReadTimeout: 300 * time.Millisecond,
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if switched.Load() {
				return second.DialContext(ctx, network, addr)
			}
			return first.DialContext(ctx, network, addr)
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	b, err := redisbackend.New(t.Context(), client, redisbackend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })

	first.Hold()
	switched.Store(true)
	req := try("k")
	release(t, b, acquire(t, b, req))
	release(t, b, acquire(t, b, try("k"))) // the next holder, of the same Backend
	land(t, first)
	if held, err := b.Inspect(t.Context(), "k"); err != nil || held.ID == req.ID {
		t.Errorf("a released request holds the lock: %+v, %v", held, err)
	}
}

// The first waiter is dead when the lock is released. Those behind it are alive, and come before a newcomer.
func TestNewcomerDoesNotOvertakeTheLiving(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, newcomer := open(t, server.URL), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	dying, die := context.WithCancel(t.Context())
	dead := wait(dying, t, open(t, server.URL), request("k"), 1)
	second, third := open(t, server.URL), open(t, server.URL)
	secondGrant := wait(t.Context(), t, second, request("k"), 2)
	thirdGrant := wait(t.Context(), t, third, request("k"), 3)
	die() // without a clean-up, as a process does
	<-dead
	release(t, holder, held)
	time.Sleep(320 * time.Millisecond) // more than the grace of the first
	if _, err := newcomer.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a newcomer got %v, want ErrHeld", err)
	}
	release(t, second, granted(t, secondGrant, 10*time.Second).lease)
	release(t, third, granted(t, thirdGrant, 10*time.Second).lease)
}

// A hundred waiters died together. Those behind them are alive, and come before a newcomer.
func TestNewcomerDoesNotOvertakeBehindManyDead(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, newcomer, admin := open(t, server.URL), open(t, server.URL), direct(t, server)
	held := acquire(t, holder, request("k"))
	var dead []redis.Z
	for i := range 120 {
		dead = append(dead, redis.Z{Score: float64(time.Now().UnixMicro()), Member: fmt.Sprintf("dead-%d nowhere", i)})
	}
	for _, set := range []string{"locker:{k}:order", "locker:{k}:seen"} {
		if err := admin.ZAdd(t.Context(), set, dead...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	waiting := wait(ctx, t, open(t, server.URL), request("k"), len(dead)+1)
	stop() // from here on the test itself says when the waiter polls
	<-waiting
	alive := admin.ZRange(t.Context(), "locker:{k}:order", -1, -1).Val()[0]
	release(t, holder, held)
	for range 3 {
		if err := admin.ZAdd(t.Context(), "locker:{k}:seen", redis.Z{Score: float64(time.Now().UnixMicro()), Member: alive}).Err(); err != nil {
			t.Fatal(err)
		}
		if _, err := newcomer.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
			t.Fatalf("a newcomer got %v before a waiter that has just polled, want ErrHeld", err)
		}
		time.Sleep(320 * time.Millisecond) // more than the grace of those before
	}
	var next locker.Lease
	eventually(t, "the newcomer comes after a waiter that has died too", func() (granted bool) {
		var err error
		next, err = newcomer.Acquire(t.Context(), try("k"))
		return err == nil
	})
	release(t, newcomer, next)
}

func TestExtendRefusesTTLsThatNoLeaseHas(t *testing.T) {
	t.Parallel()
	b := open(t, start(t).URL)
	lease := acquire(t, b, request("k"))
	for _, ttl := range []time.Duration{0, -time.Second, locker.MaxTTL + 1} {
		odd := lease
		odd.TTL = ttl
		if _, err := b.Extend(t.Context(), odd); err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("Extend with a TTL of %v: %v", ttl, err)
		}
	}
	if _, err := b.Extend(t.Context(), lease); err != nil {
		t.Errorf("the lease was not left alone: %v", err)
	}
}
