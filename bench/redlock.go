package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker/internal/servertest"
)

// redlockSystem is five independent servers, of which one can hang.
var redlockSystem = system{
	name: "redlock",
	start: func(ctx context.Context) (string, func() error, error) {
		group, err := servertest.StartRedisGroup(ctx, 5, "--appendonly", "no")
		if err != nil {
			return "", nil, err
		}
		redlockServers = group
		for _, m := range group.Members {
			if err := inUse(ctx, m.Addr); err != nil {
				return "", nil, errors.Join(err, group.Stop())
			}
		}
		return group.URL, group.Stop, nil
	},
	watch: func(ctx context.Context, rawURL string) (monitor, error) {
		return newRedisMonitor(ctx, "redis://"+redlockHosts(rawURL)[0])
	},
	peers: []peer{
		{name: ours, open: openLocker},
		{name: "redsync", open: openRedsyncOnAll, mute: true},
	},
	scenarios: []scenario{
		{name: "uncontended", figures: uncontendedFigures, run: uncontended},
		{name: "uncontended, one server hangs", figures: uncontendedFigures, run: oneHangs},
	},
}

// redlockServers are those that redlockSystem has started; nil for given ones.
var redlockServers *servertest.RedisGroup

// inUse makes a new server believe that it has been in use for long: our Redlock would keep it out of votes at first.
func inUse(ctx context.Context, addr string) error {
	c := redis.NewClient(&redis.Options{Addr: addr})
	defer c.Close()
	info, err := c.Info(ctx, "server").Result()
	if err != nil {
		return err
	}
	_, run, _ := strings.Cut(info, "run_id:")
	run, _, _ = strings.Cut(run, "\r")
	return c.Set(ctx, "locker:memory", fmt.Sprint(run, " ", time.Now().Add(-time.Hour).UnixMicro()), 0).Err()
}

// oneHangs is uncontended while one of the servers accepts everything and answers nothing.
func oneHangs(ctx context.Context, b *bench, p peer) (figures []float64, err error) {
	if redlockServers == nil {
		return nil, errors.New("given servers cannot be made to hang")
	}
	hung := redlockServers.Members[0]
	clients, closeAll, err := b.open(ctx, p, 1, longTTL)
	if err != nil {
		return nil, err
	}
	if err := hung.Pause(ctx); err != nil {
		closeAll()
		return nil, err
	}
	defer func() {
		err = errors.Join(err, hung.Resume(ctx))
		closeAll()
	}()
	key := b.key()
	var times []float64
	end := time.Now().Add(b.short(2 * time.Second)) // some wait for the hung one every time
	for len(times) == 0 || time.Now().Before(end) {
		start := time.Now()
		if err := pair(ctx, clients[0], key); err != nil {
			return nil, err
		}
		times = append(times, float64(time.Since(start))/float64(time.Microsecond))
	}
	return []float64{percentile(times, 50)}, nil
}

// redlockHosts are the hosts of a URL, which the standard library takes for one.
func redlockHosts(rawURL string) []string {
	hosts, _, _ := strings.Cut(strings.TrimPrefix(rawURL, "redlock://"), "?")
	return strings.Split(hosts, ",")
}

type redsyncOnAll struct {
	redsyncClient
	closeAll []*redis.Client
}

func openRedsyncOnAll(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	var all redsyncOnAll
	var pools []redsyncredis.Pool
	for _, host := range redlockHosts(rawURL) {
		c, err := openRedis("redis://" + host)
		if err != nil {
			return nil, errors.Join(err, all.close())
		}
		all.closeAll = append(all.closeAll, c)
		pools = append(pools, goredis.NewPool(c))
	}
	all.redsyncClient = redsyncClient{nil, redsync.New(pools...), ttl}
	return all, nil
}

func (c redsyncOnAll) close() error {
	var errs []error
	for _, one := range c.closeAll {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}
