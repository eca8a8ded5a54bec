package redisbackend_test

import (
	"context"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

func TestSentinelURLs(t *testing.T) {
	t.Parallel()
	for rawURL, word := range map[string]string{
		"redis+sentinel://u:s3cret@s1,s2,s3":               "does not name the primary",
		"redis+sentinel://u:s3cret@s1,s2,s3/":              "does not name the primary",
		"redis+sentinel:///primary":                        "names no servers",
		"redis+sentinel://u:s3cret@s1/primary/one":         "write redis+sentinel://s1,s2,s3/NAME/0",
		"redis+sentinel://u:s3cret@s1/primary/1?db=2":      "write redis+sentinel://s1,s2,s3/NAME/0",
		"redis+sentinel://s1/primary?sentinel_pass=s3cret": "known are ca, db, dial_timeout, pool_size, prefix, replicas, sentinel_password, sentinel_user",
		"redis+sentinel://s1/primary?replicas=-1":          "replicas must be a number from 0",
		"redis+sentinel://s1/primary?ca=x":                 "write rediss+sentinel://",
		"rediss+sentinel://s1/primary?ca=/does/not/exist":  "/does/not/exist",
	} {
		refuses(t, rawURL, word)
	}
}

func TestWrongSentinels(t *testing.T) {
	t.Parallel()
	group := servertest.Sentinel(t, servertest.SentinelOptions{Password: "s3cret", SentinelPassword: "s3cret2"})
	with := func(change func(*url.URL)) string {
		hosts := group.URL[strings.LastIndex(group.URL, "@")+1:]
		hosts, _, _ = strings.Cut(hosts, "/")
		u, err := url.Parse(strings.Replace(group.URL, hosts, "hosts", 1))
		if err != nil {
			t.Fatal(err)
		}
		u.Host = hosts
		change(u)
		return u.String()
	}
	refuses(t, with(func(u *url.URL) { u.Path = "/other" }), `no Sentinel that answers knows a primary named "other"`)
	refuses(t, with(func(u *url.URL) { u.RawQuery = "" }), "the Sentinel wants another user or password", "sentinel_password")
	refuses(t, with(func(u *url.URL) { u.RawQuery = "sentinel_password=s3cret3" }), "the Sentinel wants another user or password")
	refuses(t, with(func(u *url.URL) { u.User = nil }), "the server wants a password")
	refuses(t, with(func(u *url.URL) { u.User = url.UserPassword("", "s3cret3") }), "refuses this user or password")
	refuses(t, with(func(u *url.URL) { u.Host = "127.0.0.1:1,127.0.0.1:2" }), "no Sentinel tells which server is the primary", "127.0.0.1:1", "refused")
	silent := fake(t, func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)); <-t.Context().Done() })
	refuses(t, with(func(u *url.URL) { u.Host = silent + ",127.0.0.1:2" }), "did not answer")
	refuses(t, with(func(u *url.URL) { u.Host = group.Members[0].Addr }), "no Sentinel tells which server is the primary")

	refuses(t, "redis://:s3cret2@"+group.Sentinels[0].Addr, "the server is a Sentinel: write redis+sentinel://")

	// One that can be reached is enough.
	l := open(t, with(func(u *url.URL) { u.Host = silent + "," + group.Sentinels[1].Addr + ",127.0.0.1:2" }))
	release(t, l, acquire(t, l, request("k")))
}

// Two of three Sentinels do not answer: one stands still, one is down. Nobody waits for them.
func TestSentinelsDown(t *testing.T) {
	t.Parallel()
	group := servertest.Sentinel(t, servertest.SentinelOptions{})
	l := open(t, group.URL)
	held := acquire(t, l, request("held"))
	if err := errors.Join(group.Sentinels[0].Pause(t.Context()), group.Sentinels[1].Kill(t.Context())); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Extend(t.Context(), held); err != nil {
		t.Errorf("extend: %v", err)
	}
	began := time.Now()
	other := open(t, group.URL)
	if _, err := other.Acquire(t.Context(), try("held")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("acquire of a held key: %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v to open a Locker with one of three Sentinels", took)
	}
	if err := group.Sentinels[2].Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Extend(t.Context(), held); err != nil {
		t.Errorf("extend without any Sentinel: %v", err)
	}
	release(t, l, held)
}

// Those who wait go on waiting while another server takes over, and are woken by it.
func TestSentinelFailoverWithWaiters(t *testing.T) { // alone: Sentinels need the processor to agree
	group := servertest.Sentinel(t, servertest.SentinelOptions{})
	lockers := map[string]*redisbackend.Backend{"of a URL": open(t, group.URL), "handed in": handedIn(t, group, redisbackend.Options{})}
	for name, l := range lockers {
		other := open(t, group.URL)
		held := acquire(t, other, request(name))
		first := wait(t.Context(), t, l, request(name), 1)
		second := wait(t.Context(), t, l, request(name), 2)
		primary, err := group.Primary(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := group.Members[primary].Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := group.Primary(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the lock is extended by the new primary", func() bool { _, err := other.Extend(t.Context(), held); return err == nil })
		eventually(t, "both wait at the new primary", func() bool { h, err := other.Inspect(t.Context(), name); return err == nil && h.Waiters == 2 })
		release(t, other, held)
		// Who was silent for too long has lost its place: either may be the first.
		next, last := answer{}, second
		select {
		case next = <-first:
		case next = <-second:
			last = first
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: nobody is granted the lock", name)
		}
		if next.err != nil {
			t.Fatalf("%s: acquire: %v", name, next.err)
		}
		if next.lease.Token <= held.Token {
			t.Errorf("%s: token %d follows %d", name, next.lease.Token, held.Token)
		}
		eventually(t, "the subscription is back", func() bool { return subscriptions(t, group) >= 2 })
		released := time.Now()
		release(t, l, next.lease)
		then := granted(t, last, 10*time.Second)
		if took := then.at.Sub(released); took > time.Second {
			t.Errorf("%s: woken after %v: not by a message", name, took)
		}
		release(t, l, then.lease)
		if err := errors.Join(group.Members[primary].Start(t.Context()), group.Complete(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
}

// An operator's failover costs no lock whose TTL is longer than the Sentinels need for it.
func TestSentinelFailover(t *testing.T) {
	t.Parallel()
	group := servertest.Sentinel(t, servertest.SentinelOptions{})
	l := open(t, group.URL)
	client, err := locker.New(l, locker.WithTTL(10*time.Second), locker.WithHeartbeat(200*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	lock, err := client.Acquire(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	token := lock.Token()
	for range 2 {
		if err := group.Failover(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := lock.Deadline()
		eventually(t, "the lock is extended by the new primary", func() bool { return lock.Deadline().After(before) })
		if _, err := open(t, group.URL).Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
			t.Errorf("acquire of a held key: %v", err)
		}
	}
	if err := lock.Release(t.Context()); err != nil {
		t.Errorf("release: %v", err)
	}
	// The new primary did not know the scripts.
	if next := acquire(t, l, try("k")); next.Token <= token {
		t.Errorf("token %d follows %d", next.Token, token)
	}
}

// subscriptions counts the Lockers that listen at the primary.
func subscriptions(t *testing.T, group *servertest.SentinelGroup) int {
	t.Helper()
	primary, err := group.Primary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(direct(t, group.Members[primary]).PubSubChannels(t.Context(), "locker:notices:*").Val())
}

// handedIn makes a Backend of go-redis' own client for Sentinels.
func handedIn(t *testing.T, group *servertest.SentinelGroup, opts redisbackend.Options) *redisbackend.Backend {
	t.Helper()
	settings := redis.FailoverOptions{MasterName: servertest.SentinelName}
	for _, s := range group.Sentinels {
		settings.SentinelAddrs = append(settings.SentinelAddrs, s.Addr)
	}
	client := redis.NewFailoverClient(&settings)
	t.Cleanup(func() { _ = client.Close() })
	b, err := redisbackend.New(t.Context(), client, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// A holder that still reaches a primary which was cut off from everybody else goes on extending, and another server takes over. What
// comes of it depends on what the holder demands, and on whether it hears the Sentinels.
func TestSentinelIsolatedPrimary(t *testing.T) {
	t.Parallel()
	const ttl = 2 * time.Second
	for _, c := range []struct {
		name      string
		params    string
		sentinels bool // can be reached by the holder
		overlaps  bool // the holder believes in its lock although another has it
	}{
		{"all replicas demanded", "?replicas=2", false, false},
		{"one replica demanded", "?replicas=1", false, false},
		{"no replicas demanded", "", false, true},
		{"the Sentinels are heard", "", true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			group := servertest.Sentinel(t, servertest.SentinelOptions{})
			primary, err := group.Primary(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			old := group.Members[primary]
			isolated := make(chan struct{})
			dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
				var d net.Dialer
				select {
				case <-isolated:
					if addr == old.Addr {
						return d.DialContext(ctx, "unix", old.Socket)
					}
					if !c.sentinels {
						return nil, errors.New("the other side of a partition")
					}
				default:
				}
				return d.DialContext(ctx, network, addr)
			}
			l := openConfig(t, group.URL+c.params, locker.Config{Dial: dial})
			if early := l.Capabilities().EarlyFree; early&locker.EarlyFreeFailover != 0 != (c.params != "?replicas=2") {
				t.Errorf("EarlyFree is %v", early)
			}
			client, err := locker.New(l, locker.WithTTL(ttl))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = client.Close() })
			lock, err := client.Acquire(t.Context(), "k")
			if err != nil {
				t.Fatal(err)
			}

			close(isolated)
			if err := group.Isolate(t.Context(), primary); err != nil {
				t.Fatal(err)
			}
			// What the holder knew of the primary's address is all that it has: it cannot ask, if it does not reach a Sentinel.
			if next, err := group.Primary(t.Context()); err != nil || next == primary {
				t.Fatalf("the primary is %d: %v", next, err)
			}
			observer := open(t, group.URL)
			next := acquire(t, observer, request("k"))
			granted := time.Now()
			err = lock.Err()
			switch {
			case c.overlaps && err != nil:
				t.Errorf("told %v although nothing has told the holder", err)
			case !c.overlaps && err == nil && !c.sentinels:
				t.Errorf("another has been granted the lock %v ago, and the holder trusts it for another %v", time.Since(granted), time.Until(lock.Deadline()))
			case c.sentinels: // at the next heartbeat at the latest
				eventually(t, "the holder is told", func() bool { return lock.Err() != nil })
				if late := time.Since(granted); late > ttl {
					t.Errorf("told %v after the grant", late)
				}
			}
			if next.Token <= lock.Token() {
				t.Errorf("token %d follows %d", next.Token, lock.Token())
			}
			if c.overlaps {
				if err := group.Rejoin(t.Context(), primary); err != nil {
					t.Fatal(err)
				}
				// The Sentinels make the old primary a replica, which refuses the holder.
				eventually(t, "the holder is told after the partition", func() bool { return lock.Err() != nil })
			}
		})
	}
}
