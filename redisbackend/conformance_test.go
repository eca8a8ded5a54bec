package redisbackend_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	_ "github.com/fec20105/locker/redisbackend"
)

// serveURL makes this test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_REDISBACKEND_SERVE"

func TestMain(m *testing.M) {
	if url := os.Getenv(serveURL); url != "" {
		err := conformance.Serve(context.Background(), func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
			return locker.OpenLocker(ctx, url, locker.Config{Dial: net.DialContext})
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{Private: true})
	conformance.Run(t, harness(t, server))
}

func harness(t *testing.T, server *servertest.Server) conformance.Harness {
	const prefix = "conformance:"
	rawURL := server.URL + "?prefix=" + prefix
	open := func(params string) func(context.Context, *conformance.Network) (locker.Locker, error) {
		return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
			return locker.OpenLocker(ctx, rawURL+params, locker.Config{Dial: net.DialContext})
		}
	}
	options, err := redis.ParseURL(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	admin := redis.NewClient(options)
	t.Cleanup(func() { _ = admin.Close() })
	operator, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = operator.Close() })
	breaker, _ := locker.As[locker.Breaker](operator)
	return conformance.Harness{
		TTL:   time.Second,
		Open:  open(""),
		Small: open("&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return breaker.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Server: conformance.Server{
			Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart, Wipe: server.Wipe,
		},
		Process: func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
			return cmd
		},
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			keys := admin.Scan(ctx, 0, prefix+"*", 1000).Iterator()
			for keys.Next(ctx) {
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
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			state := fmt.Sprintf("%016d %016d %010d 0  %016d", token, 0, 0, 0)
			return admin.Set(ctx, prefix+"{"+key+"}", state, time.Hour).Err()
		},
		Artifacts: t.TempDir(),
	}
}
