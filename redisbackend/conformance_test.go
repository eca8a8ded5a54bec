package redisbackend_test

import (
	"bytes"
	"context"
	"crypto/rand"
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

// TestConformance runs on the server that LOCKER_TEST_REDIS names, else on a private one, which the suite also hurts.
func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{})
	h := harness(t, server)
	if server.Private() {
		h.Server = conformance.Server{
			Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart, Wipe: server.Wipe,
		}
	}
	conformance.Run(t, h)
}

// harness is one suite's, under a prefix of its own: others may use the same server.
func harness(t *testing.T, server *servertest.Server) conformance.Harness {
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := server.URL + "?prefix=" + prefix
	admin := direct(t, server)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		keys := admin.Scan(ctx, 0, prefix+"*", 1000).Iterator()
		for keys.Next(ctx) {
			_ = admin.Unlink(ctx, keys.Val()) // the scan would tell of a server that is gone
		}
		if err := keys.Err(); err != nil {
			t.Errorf("removing what the suite has left: %v", err)
		}
	})
	operator := open(t, rawURL)
	return conformance.Harness{
		TTL:   2 * time.Second,
		Open:  opener(rawURL),
		Small: opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
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
			state := fmt.Sprintf("%016d %016d %016d %010d 0000 - - ", token, 0, 0, 0)
			return admin.Set(ctx, prefix+"{"+key+"}", state, time.Hour).Err()
		},
		Artifacts: t.TempDir(),
	}
}
