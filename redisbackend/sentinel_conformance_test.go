package redisbackend_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
)

// TestSentinelConformance runs the suite on a primary with two replicas, one of which must confirm each grant and each
// extension. So no lock is held without a majority. It is not parallel: six servers and two suites at once are too much for a small
// machine.
func TestSentinelConformance(t *testing.T) {
	group := servertest.Sentinel(t, servertest.SentinelOptions{})
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := group.URL + "?replicas=1&prefix=" + prefix
	operator := open(t, rawURL)
	primary := func(ctx context.Context) (*redis.Client, error) {
		i, err := group.Primary(ctx)
		if err != nil {
			return nil, err
		}
		return redis.NewClient(&redis.Options{Addr: group.Members[i].Addr}), nil
	}
	all := func(hurt func(*servertest.Server, context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			err := group.Each(func(s *servertest.Server) error { return hurt(s, ctx) })
			if err == nil {
				_, err = group.Primary(ctx)
			}
			return err
		}
	}
	h := conformance.Harness{
		TTL:   1500 * time.Millisecond,
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
		Server: conformance.Server{
			Pause: func(ctx context.Context) error {
				return group.Each(func(s *servertest.Server) error { return s.Pause(ctx) })
			},
			Resume:  all((*servertest.Server).Resume),
			Crash:   all((*servertest.Server).Crash),
			Restart: all((*servertest.Server).Restart),
			Wipe:    all((*servertest.Server).Wipe),
		},
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			admin, err := primary(ctx)
			if err != nil {
				return nil, nil, err
			}
			defer admin.Close()
			return keysOf(ctx, admin, prefix)
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			admin, err := primary(ctx)
			if err != nil {
				return err
			}
			defer admin.Close()
			state := fmt.Sprintf("%016d %016d %016d %010d 0000 - - ", token, 0, 0, 0)
			return admin.Set(ctx, prefix+"{"+key+"}", state, time.Hour).Err()
		},
		Artifacts: t.TempDir(),
	}
	// Not MoveLeader: for the second that Sentinels need to see that a replica was promoted, the old primary goes on extending.
	h.Cluster = conformance.Cluster{Leader: group.Primary, Election: 5 * time.Second}
	for _, m := range group.Members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{
			Pause: m.Pause, Resume: m.Resume, Kill: m.Kill,
			// One that has not caught up yet confirms nothing.
			Start: func(ctx context.Context) error { return errors.Join(m.Start(ctx), group.Complete(ctx)) },
		})
	}
	conformance.Run(t, h)
}

// keysOf lists what begins with a prefix, and what of it never expires.
func keysOf(ctx context.Context, admin *redis.Client, prefix string) (all, immortal []string, err error) {
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
}
