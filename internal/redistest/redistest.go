// Package redistest hooks the conformance suite up to redisbackend, for servers of any kind: processes of this machine,
// given ones, and containers.
package redistest

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

// serveURL makes a test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_REDISTEST_SERVE"

// Serve is the first call of a TestMain: it does not return in a process that conformance has started.
func Serve() {
	url := os.Getenv(serveURL)
	if url == "" {
		return
	}
	if err := conformance.Serve(context.Background(), Opener(url)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// process starts this program once more, to serve.
func process(rawURL string) func(context.Context) *exec.Cmd {
	return func(ctx context.Context) *exec.Cmd {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
		return cmd
	}
}

// Opener opens the Lockers of the suite. Their subscriptions can be cut alone.
func Opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		net.LabelBy(func(written []byte) string {
			if bytes.Contains(written, []byte("subscribe")) {
				return "notify"
			}
			return ""
		})
		return locker.OpenLocker(ctx, rawURL, locker.Config{Dial: net.DialContext})
	}
}

// Open opens a Backend as another process would.
func Open(tb testing.TB, rawURL string, cfg locker.Config) *redisbackend.Backend {
	tb.Helper()
	l, err := locker.OpenLocker(tb.Context(), rawURL, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return l.(*redisbackend.Backend)
}

// Direct is a client without redisbackend, to look behind it.
func Direct(tb testing.TB, server *servertest.Server) *redis.Client {
	tb.Helper()
	opts, err := redis.ParseURL(server.URL)
	if err != nil {
		tb.Fatal(err)
	}
	client := redis.NewClient(opts)
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Harness is one suite's, under a prefix of its own: others may use the same server. A private server is also hurt.
func Harness(tb testing.TB, server *servertest.Server) conformance.Harness {
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := server.URL + "?prefix=" + prefix
	admin := Direct(tb, server)
	tb.Cleanup(func() {
		ctx := context.WithoutCancel(tb.Context())
		keys := admin.Scan(ctx, 0, prefix+"*", 1000).Iterator()
		for keys.Next(ctx) {
			_ = admin.Unlink(ctx, keys.Val()) // the scan would tell of a server that is gone
		}
		if err := keys.Err(); err != nil {
			tb.Errorf("removing what the suite has left: %v", err)
		}
	})
	operator := Open(tb, rawURL, locker.Config{})
	h := conformance.Harness{
		TTL:   2 * time.Second,
		Open:  Opener(rawURL),
		Small: Opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Process: process(rawURL),
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			return leftovers(ctx, admin, prefix)
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			return admin.Set(ctx, prefix+"{"+key+"}", released(token), time.Hour).Err()
		},
		Artifacts: tb.TempDir(),
	}
	if server.Private() {
		h.Server = conformance.Server{
			Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart, Wipe: server.Wipe,
		}
	}
	return h
}

// released is the state of a free lock that was last granted with this token.
func released(token uint64) string {
	return fmt.Sprintf("%016d %016d %016d %010d 0000 - - ", token, 0, 0, 0)
}

// leftovers lists what begins with a prefix, and what of it never expires.
func leftovers(ctx context.Context, admin *redis.Client, prefix string) (all, immortal []string, err error) {
	keys := admin.Scan(ctx, 0, prefix+"*", 1000).Iterator()
	for keys.Next(ctx) {
		if keys.Val() == prefix+"memory" {
			continue // one for each server of a Redlock, for as long as the server is used
		}
		ttl, err := admin.TTL(ctx, keys.Val()).Result()
		if err != nil {
			return nil, nil, err
		}
		all = append(all, keys.Val())
		if ttl == -1 {
			immortal = append(immortal, keys.Val())
		}
	}
	return all, immortal, keys.Err()
}

// RedlockHarness is for independent servers, each of which the suite hurts, and all of them together.
func RedlockHarness(tb testing.TB, group *servertest.RedisGroup) conformance.Harness {
	prefix := "conformance-" + rand.Text() + ":"
	Remember(tb, group, prefix)
	rawURL := group.URL + "?durable=true&quarantine=10s&prefix=" + prefix
	operator, err := locker.OpenLocker(tb.Context(), rawURL, locker.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = operator.Close() })
	breaker, _ := locker.As[locker.Breaker](operator)
	all := func(fault func(*servertest.Server, context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			return group.Each(func(s *servertest.Server) error { return fault(s, ctx) })
		}
	}
	h := conformance.Harness{
		TTL:   2 * time.Second, // five servers on one machine are slower than one
		Open:  Opener(rawURL),
		Small: Opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return breaker.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Process: process(rawURL),
		Server: conformance.Server{
			Pause:   all((*servertest.Server).Pause),
			Resume:  all((*servertest.Server).Resume),
			Crash:   all((*servertest.Server).Crash),
			Restart: all((*servertest.Server).Restart),
			Wipe:    all((*servertest.Server).Wipe),
		},
		Artifacts: tb.TempDir(),
	}
	var admins []*redis.Client
	for _, m := range group.Members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{Pause: m.Pause, Resume: m.Resume, Kill: m.Kill, Start: m.Start})
		admins = append(admins, Direct(tb, m))
	}
	h.Leftovers = func(ctx context.Context) (all, immortal []string, err error) {
		for i, admin := range admins {
			left, forever, err := leftovers(ctx, admin, prefix)
			if err != nil {
				return nil, nil, err
			}
			for _, key := range left {
				all = append(all, fmt.Sprintf("%d/%s", i, key))
			}
			for _, key := range forever {
				immortal = append(immortal, fmt.Sprintf("%d/%s", i, key))
			}
		}
		return all, immortal, nil
	}
	h.SeedToken = func(ctx context.Context, key string, token uint64) error {
		for _, admin := range admins {
			state := fmt.Sprintf("%016d %016d %016d %010d 0000 \x7f - ", token, 0, 0, 0)
			if err := admin.Set(ctx, prefix+"{"+key+"}", state, time.Hour).Err(); err != nil {
				return err
			}
		}
		return nil
	}
	return h
}

// Remember makes new servers believe that they have been in use for long, so that they need no quarantine.
func Remember(tb testing.TB, group *servertest.RedisGroup, prefix string) {
	tb.Helper()
	for _, m := range group.Members {
		server := Direct(tb, m)
		_, run, _ := strings.Cut(server.Info(tb.Context(), "server").Val(), "run_id:")
		run, _, _ = strings.Cut(run, "\r")
		if err := server.Set(tb.Context(), prefix+"memory", fmt.Sprint(run, " ", time.Now().Add(-time.Hour).UnixMicro()), 0).Err(); err != nil {
			tb.Fatal(err)
		}
	}
}
