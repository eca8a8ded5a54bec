package redisbackend_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
)

// serveURL makes this test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_REDISBACKEND_SERVE"

func TestMain(m *testing.M) {
	if url := os.Getenv(serveURL); url != "" {
		if err := conformance.Serve(context.Background(), opener(url)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	examples, err := servertest.StartRedis(context.Background(), servertest.RedisOptions{Private: true})
	if err == nil {
		exampleAddr = func() string { return examples.Addr }
	} else {
		_ = flag.Set("test.skip", "^Example") // tests skip themselves, or fail
	}
	code := m.Run()
	if err == nil {
		_ = examples.Stop()
	}
	os.Exit(code)
}

// exampleAddr is where the examples find a Redis.
var exampleAddr func() string

// opener opens the Lockers of the suite. Their subscriptions can be cut alone.
func opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
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

func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{Private: true})
	conformance.Run(t, harness(t, server))
}

func harness(t *testing.T, server *servertest.Server) conformance.Harness {
	const prefix = "conformance:"
	rawURL := server.URL + "?prefix=" + prefix
	admin := direct(t, server)
	operator := open(t, rawURL)
	return conformance.Harness{
		TTL:   time.Second,
		Open:  opener(rawURL),
		Small: opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
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
