package redisbackend_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/redisbackend"
)

func TestAcquireIsIdempotent(t *testing.T) {
	t.Parallel()
	l := open(t, start(t).URL)
	req := request("k")
	first := acquire(t, l, req)
	again := acquire(t, l, req)
	if again.Token != first.Token || !again.Start.After(first.Start) {
		t.Errorf("the repeated acquire answers token %d from %v, want %d from later than %v", again.Token, again.Start, first.Token, first.Start)
	}
	if _, err := l.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("another request gets %v, want ErrHeld", err)
	}
}

func TestForget(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, client := open(t, server.URL), direct(t, server)
	forget := func(key string) error { return l.Forget(t.Context(), key) }
	if err := forget("k"); err != nil {
		t.Errorf("forgetting a key that was never used: %v", err)
	}
	req := request("k")
	lease := acquire(t, l, req)
	if err := forget("k"); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("forgetting a held key: %v, want ErrHeld", err)
	}
	release(t, l, lease)
	if err := forget("k"); err != nil {
		t.Fatal(err)
	}
	left := client.Keys(t.Context(), "*{k}*").Val()
	for _, key := range left {
		if life := client.PTTL(t.Context(), key).Val(); life <= 0 || life > 15*time.Second {
			t.Errorf("%q lives for %v after Forget", key, life)
		}
	}
	if late, err := l.Acquire(t.Context(), req); err == nil {
		t.Errorf("a late copy of the last request is granted after Forget: %+v", late)
	}
	if err := l.Release(t.Context(), lease); err != nil {
		t.Errorf("a repeated release after Forget: %v", err)
	}
	if next := acquire(t, l, request("k")); next.Token <= lease.Token {
		t.Errorf("token %d follows %d after Forget", next.Token, lease.Token)
	}
}

func TestLateAcquireIsRefused(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other := open(t, server.URL), open(t, server.URL)
	refused := func(when string, req locker.Request) {
		t.Helper()
		if lease, err := l.Acquire(t.Context(), req); err == nil || errors.Is(err, locker.ErrHeld) {
			t.Errorf("%s: the late request gets %v, %v, want to be refused", when, lease, err)
		}
	}

	withdrawn := request("withdrawn")
	release(t, l, cleanUp(withdrawn))
	refused("after its withdrawal", withdrawn)

	used := request("used")
	release(t, l, acquire(t, l, used))
	refused("after its release", used)
	release(t, other, acquire(t, other, request("used")))
	refused("after its release and another grant", used)

	held := request("lost")
	lease := acquire(t, l, held)
	if err := other.Break(t.Context(), locker.Holding{Key: "lost", Token: lease.Token}); err != nil {
		t.Fatal(err)
	}
	refused("after its loss", held)
	odd := request("lost") // what the state says of a broken lock is no request's ID
	odd.ID = "-"
	release(t, l, acquire(t, l, odd))
	if holding, err := l.Inspect(t.Context(), "lost"); err != nil || holding.Token != 0 || holding.Waiters != 0 {
		t.Errorf("the late request has left %+v, %v", holding, err)
	}
}

func TestReleaseOutcomes(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other := open(t, server.URL), open(t, server.URL)

	lease := acquire(t, l, request("k"))
	release(t, l, lease)
	release(t, l, lease)
	successor := acquire(t, other, request("k"))
	release(t, l, lease)
	release(t, l, cleanUp(locker.Request{Key: lease.Key, ID: lease.ID}))
	if _, err := other.Extend(t.Context(), successor); err != nil {
		t.Errorf("the successor was touched: %v", err)
	}

	lost := acquire(t, l, request("lost"))
	if err := other.Break(t.Context(), locker.Holding{Key: "lost", Token: lost.Token}); err != nil {
		t.Fatal(err)
	}
	successor = acquire(t, other, request("lost"))
	for range 2 {
		if err := l.Release(t.Context(), lost); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Release after a loss: %v, want ErrLost", err)
		}
		if _, err := l.Extend(t.Context(), lost); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Extend after a loss: %v, want ErrLost", err)
		}
	}
	if _, err := other.Extend(t.Context(), successor); err != nil {
		t.Errorf("the successor was touched: %v", err)
	}
}

// A client library that repeats a release whose answer was lost must not make a loss of it, whoever has got the lock
// in between.
func TestLostAnswerOfARelease(t *testing.T) {
	t.Parallel()
	server := start(t)
	other := open(t, server.URL)
	for name, openWith := range map[string]func(*conformance.Network) locker.Locker{
		"own client": func(net *conformance.Network) locker.Locker {
			return openConfig(t, server.URL, locker.Config{Dial: net.DialContext})
		},
		"client with retries": func(net *conformance.Network) locker.Locker {
			client := redis.NewClient(&redis.Options{Addr: server.Addr, Dialer: net.DialContext, MaxRetries: 3})
			t.Cleanup(func() { _ = client.Close() })
			l, err := redisbackend.New(t.Context(), client, redisbackend.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			return l
		},
	} {
		t.Run(name, func(t *testing.T) {
			net := conformance.NewNetwork()
			defer net.Close()
			l := openWith(net)
			for _, taken := range []bool{false, true} {
				lease := acquire(t, l, request(name))
				swallowed := net.SwallowReply()
				err := l.Release(t.Context(), lease)
				select {
				case <-swallowed:
				default:
					t.Fatal("the answer was not lost")
				}
				if errors.Is(err, locker.ErrLost) || name == "client with retries" && err != nil {
					t.Errorf("the first Release: %v", err)
				}
				if taken {
					release(t, other, acquire(t, other, try(name)))
				}
				release(t, l, lease)
			}
		})
	}
}

func TestExpiredLeaseIsLost(t *testing.T) {
	t.Parallel()
	l := open(t, start(t).URL)
	req := request("k")
	req.TTL = 20 * time.Millisecond
	lease := acquire(t, l, req)
	eventually(t, "the lease has ended", func() bool {
		holding, err := l.Inspect(t.Context(), "k")
		return err == nil && holding.Token == 0
	})
	if _, err := l.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend: %v, want ErrLost", err)
	}
	if err := l.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release: %v, want ErrLost", err)
	}
	if next := acquire(t, l, request("k")); next.Token <= lease.Token {
		t.Errorf("token %d follows %d", next.Token, lease.Token)
	}
}

func TestBreakTellsTheHolder(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, operator := open(t, server.URL), open(t, server.URL)
	told := make(chan locker.Reason, 2)
	req := request("k")
	req.Lost = func(r locker.Reason) { told <- r }
	lease := acquire(t, l, req)
	subscribed(t, server.Addr, 1)
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token + 1}); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Break of another grant: %v, want ErrLost", err)
	}
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}); err != nil {
		t.Fatal(err)
	}
	select {
	case reason := <-told:
		if reason != locker.ReasonTaken {
			t.Errorf("told %v, want taken", reason)
		}
	case <-time.After(time.Second):
		t.Error("not told within a second")
	}
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}); !errors.Is(err, locker.ErrLost) {
		t.Errorf("second Break: %v, want ErrLost", err)
	}
	if len(told) != 0 {
		t.Error("told twice")
	}
}

// A message that was missed while nobody listened is made up for when the subscription begins again.
func TestBreakWhileNobodyListens(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, operator, admin := open(t, server.URL), open(t, server.URL), direct(t, server)
	hold := func(key string) (locker.Lease, <-chan locker.Reason) {
		told := make(chan locker.Reason, 2)
		req := request(key)
		req.Lost = func(r locker.Reason) { told <- r }
		return acquire(t, l, req), told
	}
	broken, told := hold("broken")
	kept, toldKept := hold("kept")
	released, toldReleased := hold("released")
	subscribed(t, server.Addr, 1)
	if err := admin.Do(t.Context(), "client", "kill", "type", "pubsub").Err(); err != nil {
		t.Fatal(err)
	}
	if err := operator.Break(t.Context(), locker.Holding{Key: "broken", Token: broken.Token}); err != nil {
		t.Fatal(err)
	}
	release(t, l, released)
	select {
	case reason := <-told:
		if reason != locker.ReasonTaken {
			t.Errorf("told %v, want taken", reason)
		}
	case <-time.After(5 * time.Second):
		t.Error("not told")
	}
	release(t, l, kept)
	if len(told)+len(toldKept)+len(toldReleased) != 0 {
		t.Error("told twice, or of a lock that was not lost")
	}
}

// subscribed waits until as many Backends listen.
func subscribed(t *testing.T, addr string, n int) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close()
	eventually(t, "the Backend listens", func() bool {
		channels, err := client.PubSubChannels(t.Context(), "*").Result()
		return err == nil && len(channels) == n
	})
}

func TestLeaseOfAnotherLocker(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other := open(t, server.URL), open(t, server.URL)
	lease := acquire(t, l, request("k"))
	foreign := lease
	foreign.State = "foreign"
	stripped := lease
	stripped.State = nil
	for name, c := range map[string]struct {
		l     locker.Locker
		lease locker.Lease
	}{"of another Backend": {other, lease}, "of another package": {l, foreign}, "without State": {l, stripped}} {
		_, extend := c.l.Extend(t.Context(), c.lease)
		for _, err := range []error{extend, c.l.Release(t.Context(), c.lease)} {
			if err == nil || errors.Is(err, locker.ErrLost) || !strings.Contains(err.Error(), "another Locker") {
				t.Errorf("a lease %s: %v", name, err)
			}
		}
	}
	release(t, l, lease)
}

func TestTokens(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, admin := open(t, server.URL), direct(t, server)

	// Before the clock reaches it, a token of the year 2100 grows by one.
	const year2100 = 4_102_444_800_000_000
	state := fmt.Sprintf("%016d %016d %016d %010d 0000 - - ", int64(year2100), 0, 0, 0)
	if err := admin.Set(t.Context(), "locker:{future}", state, time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	for want := uint64(year2100 + 1); want < year2100+5; want++ {
		lease := acquire(t, l, request("future"))
		if lease.Token != want {
			t.Errorf("token %d, want %d", lease.Token, want)
		}
		holding, err := l.Inspect(t.Context(), "future")
		if err != nil || holding.Token != want {
			t.Errorf("Inspect says %+v, %v, want token %d", holding, err, want)
		}
		if _, err := l.Extend(t.Context(), lease); err != nil {
			t.Error(err)
		}
		release(t, l, lease)
	}
	if ttl := admin.TTL(t.Context(), "locker:{future}").Val(); ttl < time.Until(time.UnixMicro(year2100)) {
		t.Errorf("the counter is forgotten in %v, before the clock has reached the token", ttl)
	}

	// Without memory, and without persistence, the clock makes the next token.
	before := acquire(t, l, request("wiped"))
	if err := server.Wipe(t.Context()); err != nil {
		t.Fatal(err)
	}
	var after locker.Lease
	eventually(t, "the server grants again", func() bool {
		var err error
		after, err = l.Acquire(t.Context(), try("wiped"))
		return err == nil
	})
	if after.Token <= before.Token {
		t.Errorf("after the loss of all data token %d follows %d", after.Token, before.Token)
	}
}

func TestStateOutlivesTheLease(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, admin := open(t, server.URL), direct(t, server)
	for _, ttl := range []time.Duration{locker.MinTTL, time.Hour, locker.MaxTTL, time.Second} {
		req := request("k")
		req.TTL = ttl
		lease := acquire(t, l, req)
		over := func(err error) bool { return errors.Is(err, locker.ErrLost) && time.Since(lease.Start) > ttl } // as the shortest may be
		if _, err := l.Extend(t.Context(), lease); err != nil && !over(err) {
			t.Fatal(err)
		}
		if left := admin.TTL(t.Context(), "locker:{k}").Val(); left < ttl+24*time.Hour-time.Minute {
			t.Errorf("with a TTL of %v the state is forgotten in %v", ttl, left)
		}
		if err := l.Release(t.Context(), lease); err != nil && !over(err) {
			t.Fatal(err)
		}
		if left := admin.TTL(t.Context(), "locker:{k}").Val(); left < 24*time.Hour-time.Minute {
			t.Errorf("after the release the state is forgotten in %v", left)
		}
	}
}

func TestNothingIsImmortal(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other, admin := open(t, server.URL), open(t, server.URL), direct(t, server)
	lease := acquire(t, l, request("k"))
	ctx, cancel := context.WithCancel(t.Context())
	req := request("k")
	waiting := wait(ctx, t, other, req, 1)
	check := func() {
		t.Helper()
		for _, key := range admin.Keys(t.Context(), "*").Val() {
			if ttl := admin.TTL(t.Context(), key).Val(); ttl < 0 {
				t.Errorf("%q has no expiry", key)
			}
			if !strings.HasPrefix(key, "locker:{k}") {
				t.Errorf("%q is not below the lock's name", key)
			}
		}
	}
	check()
	cancel()
	<-waiting
	release(t, other, cleanUp(req))
	release(t, l, lease)
	release(t, other, acquire(t, other, request("k")))
	check()
}

func TestKeysDoNotMeet(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other, admin := open(t, server.URL), open(t, server.URL+"?prefix=other:"), direct(t, server)
	names := []string{
		"a", "A", "a ", "{a}", "{a", "a}", "{}", "{}a", "{", "}", "%", "%7B", "%7Ba%7D", "%25", "%257B",
		"a:order", "a}:order", "a}:gone:x", "a*", "a?", "[a]", `\`, "a\nb", "é", "e\u0301", strings.Repeat("k", locker.MaxKeyLength),
	}
	held := make(map[string]bool)
	for _, name := range names {
		req := request(name)
		req.Holder = "holder of " + name
		req.NoWait = true
		acquire(t, l, req)
		acquire(t, other, req)
		held[name] = true
	}
	for holding, err := range l.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if !held[holding.Key] || holding.Holder != "holder of "+holding.Key {
			t.Errorf("listed %+v", holding)
		}
		delete(held, holding.Key)
	}
	if len(held) != 0 {
		t.Errorf("not listed: %v", held)
	}
	for _, key := range admin.Keys(t.Context(), "*").Val() {
		open := strings.IndexByte(key, '{')
		end := strings.IndexByte(key[open+1:], '}')
		if end <= 0 || strings.ContainsAny(key[open+1:open+1+end], "{") {
			t.Errorf("the hash tag of %q is empty or not the lock's name", key)
		}
	}
}

func TestLabels(t *testing.T) {
	t.Parallel()
	l := open(t, start(t).URL)
	for _, label := range []string{"", " ", "a  b ", "line\nbreak", "nul\x00byte", "é✓", strings.Repeat("x", locker.MaxHolderLength)} {
		req := request("k")
		req.Holder = label
		lease := acquire(t, l, req)
		_, err := l.Acquire(t.Context(), try("k"))
		held, ok := errors.AsType[*locker.HeldError](err)
		if !ok || held.Holder != label || held.Remaining <= 0 || held.Remaining > long {
			t.Errorf("holder %q: %#v", label, err)
		}
		if holding, err := l.Inspect(t.Context(), "k"); err != nil || holding.Holder != label || holding.ID != req.ID {
			t.Errorf("holder %q: %+v, %v", label, holding, err)
		}
		release(t, l, lease)
	}
}

func TestScriptsAreSentAgain(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, admin := open(t, server.URL), direct(t, server)
	lease := acquire(t, l, request("k"))
	for _, forget := range []func(context.Context) error{
		func(ctx context.Context) error { return admin.ScriptFlush(ctx).Err() }, server.Restart,
	} {
		if err := forget(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the lease is extended", func() bool {
			_, err := l.Extend(t.Context(), lease)
			if errors.Is(err, locker.ErrLost) || err != nil && strings.Contains(err.Error(), "NOSCRIPT") {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	release(t, l, lease)
}

func TestClientIsNotClosed(t *testing.T) {
	t.Parallel()
	server := start(t)
	client := direct(t, server)
	l, err := redisbackend.New(t.Context(), client, redisbackend.Options{Prefix: "mine:"})
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, l, request("k"))
	for range 2 {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := client.Ping(t.Context()).Err(); err != nil {
		t.Errorf("the client does not work any more: %v", err)
	}
	if n := client.Exists(t.Context(), "mine:{k}").Val(); n != 1 {
		t.Error("the prefix was not used")
	}
	if _, err := l.Acquire(t.Context(), request("k")); !errors.Is(err, locker.ErrClosed) {
		t.Errorf("Acquire after Close: %v, want ErrClosed", err)
	}
	client.FlushAll(t.Context()) // so that a List which goes on would find nothing
	err = nil
	for _, err = range l.List(t.Context()) {
	}
	if !errors.Is(err, locker.ErrClosed) {
		t.Errorf("List after Close: %v, want ErrClosed", err)
	}
}

func TestConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	server := start(t)
	var open atomic.Int64
	l, err := locker.OpenLocker(t.Context(), server.URL, locker.Config{
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			open.Add(1)
			return &counted{Conn: conn, open: &open}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, l, request("k"))
	subscribed(t, server.Addr, 1)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if n := open.Load(); n != 0 {
		t.Errorf("%d connections are open after Close", n)
	}
}

type counted struct {
	net.Conn
	open   *atomic.Int64
	closed atomic.Bool
}

func (c *counted) Close() error {
	if !c.closed.Swap(true) {
		c.open.Add(-1)
	}
	return c.Conn.Close()
}
