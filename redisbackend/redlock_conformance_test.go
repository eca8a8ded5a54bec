package redisbackend_test

import (
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
)

// TestRedlockConformance runs the suite on five servers of its own, each of which it hurts, and all of them together.
func TestRedlockConformance(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 5)
	prefix := "conformance-" + rand.Text() + ":"
	remember(t, group, prefix)
	rawURL := group.URL + "?durable=true&quarantine=10s&prefix=" + prefix
	operator, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = operator.Close() })
	breaker, _ := locker.As[locker.Breaker](operator)

	h := conformance.Harness{
		TTL:   2 * time.Second, // five servers on one machine are slower than one
		Open:  opener(rawURL),
		Small: opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return breaker.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Process: func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
			return cmd
		},
		Server: conformance.Server{
			Pause: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Pause(ctx) })
			},
			Resume: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Resume(ctx) })
			},
			Crash: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Crash(ctx) })
			},
			Restart: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Restart(ctx) })
			},
			Wipe: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Wipe(ctx) })
			},
		},
		Artifacts: t.TempDir(),
	}
	var admins []*redis.Client
	for _, m := range group.Members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{Pause: m.Pause, Resume: m.Resume, Kill: m.Kill, Start: m.Start})
		admins = append(admins, direct(t, m))
	}
	h.Leftovers = func(ctx context.Context) (all, immortal []string, err error) {
		for i, admin := range admins {
			keys := admin.Scan(ctx, 0, prefix+"*", 1000).Iterator()
			for keys.Next(ctx) {
				if keys.Val() == prefix+"memory" {
					continue // one for each server, for as long as the server is used
				}
				ttl, err := admin.TTL(ctx, keys.Val()).Result()
				if err != nil {
					return nil, nil, err
				}
				name := fmt.Sprintf("%d/%s", i, keys.Val())
				all = append(all, name)
				if ttl == -1 {
					immortal = append(immortal, name)
				}
			}
			if err := keys.Err(); err != nil {
				return nil, nil, err
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
	conformance.Run(t, h)
}

// remember makes new servers believe that they have been in use for long, so that they need no quarantine.
func remember(t testing.TB, group *servertest.RedisGroup, prefix string) {
	t.Helper()
	for _, m := range group.Members {
		server := direct(t, m)
		_, run, _ := strings.Cut(server.Info(t.Context(), "server").Val(), "run_id:")
		run, _, _ = strings.Cut(run, "\r")
		if err := server.Set(t.Context(), prefix+"memory", fmt.Sprint(run, " ", time.Now().Add(-time.Hour).UnixMicro()), 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
}
