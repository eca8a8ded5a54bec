package redisbackend_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
)

// TestClusterConformance runs the suite on a Redis Cluster of three primaries, each with a replica. It is not parallel: six servers
// and two suites at once are too much for a small machine.
func TestClusterConformance(t *testing.T) {
	cluster := servertest.Cluster(t, "")
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := cluster.URL + "?prefix=" + prefix
	operator := open(t, rawURL)
	admin := directCluster(t, cluster)
	each := func(hurt func(*servertest.Server, context.Context) error, whole bool) func(context.Context) error {
		return func(ctx context.Context) error {
			err := cluster.Each(func(s *servertest.Server) error { return hurt(s, ctx) })
			if err == nil && whole {
				err = cluster.Complete(ctx)
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
			Pause:   each((*servertest.Server).Pause, false),
			Resume:  each((*servertest.Server).Resume, true),
			Crash:   each((*servertest.Server).Crash, true),
			Restart: each((*servertest.Server).Restart, true),
			Wipe:    each((*servertest.Server).Wipe, true),
		},
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			var mu sync.Mutex
			err = admin.ForEachMaster(ctx, func(ctx context.Context, server *redis.Client) error {
				some, never, err := keysOf(ctx, server, prefix)
				mu.Lock()
				defer mu.Unlock()
				all, immortal = append(all, some...), append(immortal, never...)
				return err
			})
			return all, immortal, err
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			state := fmt.Sprintf("%016d %016d %016d %010d 0000 - - ", token, 0, 0, 0)
			return admin.Set(ctx, prefix+"{"+key+"}", state, time.Hour).Err()
		},
		Artifacts: t.TempDir(),
	}
	// To the suite the cluster is one of its shards, whose primary leads, and one more replica. The other primaries lead, too: when
	// one of them is down, other locks fail over.
	members := []*servertest.Server{cluster.Members[0], cluster.Members[3], cluster.Members[4]}
	h.Cluster = conformance.Cluster{
		Asynchronous: true,
		Leader: func(ctx context.Context) (int, error) {
			owner, err := cluster.Owner(ctx, 0)
			if err != nil {
				return 0, err
			}
			return slices.Index(members, cluster.Members[owner]), nil
		},
		MoveLeader: func(ctx context.Context) error {
			owner, err := cluster.Owner(ctx, 0)
			return errors.Join(err, cluster.Failover(ctx, owner))
		},
		Election: 5 * time.Second,
	}
	for _, m := range members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{
			Pause: m.Pause, Resume: m.Resume, Kill: m.Kill,
			// One that has not caught up yet cannot take over.
			Start: func(ctx context.Context) error { return errors.Join(m.Start(ctx), cluster.Complete(ctx)) },
		})
	}
	conformance.Run(t, h)
}

// directCluster is a client without this package, to look behind it.
func directCluster(t testing.TB, cluster *servertest.RedisCluster) *redis.ClusterClient {
	t.Helper()
	settings := &redis.ClusterOptions{}
	for _, m := range cluster.Members {
		settings.Addrs = append(settings.Addrs, m.Addr)
	}
	client := redis.NewClusterClient(settings)
	t.Cleanup(func() { _ = client.Close() })
	return client
}
