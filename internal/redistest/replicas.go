package redistest

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
)

// SentinelHarness is for a primary with two replicas, one of which must confirm each grant and each extension. So no lock is
// held without a majority.
func SentinelHarness(tb testing.TB, group *servertest.SentinelGroup) conformance.Harness {
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := group.URL + "?replicas=1&prefix=" + prefix
	operator := Open(tb, rawURL, locker.Config{})
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
		Open:  Opener(rawURL),
		Small: Opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Process: process(rawURL),
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
			return leftovers(ctx, admin, prefix)
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			admin, err := primary(ctx)
			if err != nil {
				return err
			}
			defer admin.Close()
			return admin.Set(ctx, prefix+"{"+key+"}", released(token), time.Hour).Err()
		},
		Artifacts: tb.TempDir(),
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
	return h
}

// ClusterHarness is for a Redis Cluster of three primaries, each with a replica.
func ClusterHarness(tb testing.TB, cluster *servertest.RedisCluster) conformance.Harness {
	prefix := "conformance-" + rand.Text() + ":"
	rawURL := cluster.URL + "?prefix=" + prefix
	operator := Open(tb, rawURL, locker.Config{})
	admin := DirectCluster(tb, cluster)
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
		Open:  Opener(rawURL),
		Small: Opener(rawURL + "&pool_size=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		Process: process(rawURL),
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
				some, never, err := leftovers(ctx, server, prefix)
				mu.Lock()
				defer mu.Unlock()
				all, immortal = append(all, some...), append(immortal, never...)
				return err
			})
			return all, immortal, err
		},
		SeedToken: func(ctx context.Context, key string, token uint64) error {
			return admin.Set(ctx, prefix+"{"+key+"}", released(token), time.Hour).Err()
		},
		Artifacts: tb.TempDir(),
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
	return h
}

// DirectCluster is a client without redisbackend, to look behind it.
func DirectCluster(tb testing.TB, cluster *servertest.RedisCluster) *redis.ClusterClient {
	tb.Helper()
	settings := &redis.ClusterOptions{}
	for _, m := range cluster.Members {
		settings.Addrs = append(settings.Addrs, m.Addr)
	}
	client := redis.NewClusterClient(settings)
	tb.Cleanup(func() { _ = client.Close() })
	return client
}
