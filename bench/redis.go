package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"

	"github.com/fec20105/locker/internal/servertest"
	_ "github.com/fec20105/locker/redisbackend"
)

func init() { logging.Disable() } // go-redis would print what the cut links do to it

var redisSystem = system{
	name: "redis",
	start: func(ctx context.Context) (string, func() error, error) {
		s, err := servertest.StartRedis(ctx, servertest.RedisOptions{Private: true, Args: []string{"--appendonly", "no"}})
		if err != nil {
			return "", nil, err
		}
		return s.URL, s.Stop, nil
	},
	watch: newRedisMonitor,
	peers: []peer{
		{name: ours, open: openLocker},
		{name: "SET NX PX, DEL", open: openBareRedis, floor: true, mute: true},
		{name: "redislock", open: openRedislock, mute: true},
		{name: "redsync", open: openRedsync, mute: true},
		{name: "rueidislock", open: openRueidislock},
	},
}

// openRedis makes the client that the three peers on go-redis share, with that library's own settings.
func openRedis(rawURL string) (*redis.Client, error) {
	opts, err := redis.ParseURL(rawURL)
	if err != nil {
		return nil, err
	}
	opts.PoolSize = 64 // room for every goroutine of a contended scenario
	return redis.NewClient(opts), nil
}

type bareRedis struct {
	*redis.Client
	ttl time.Duration
}

func openBareRedis(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := openRedis(rawURL)
	return bareRedis{c, ttl}, err
}

func (c bareRedis) lock(ctx context.Context, key string) (held, error) {
	got, err := c.SetNX(ctx, key, "me", c.ttl).Result()
	if err == nil && !got {
		err = errors.New("held")
	}
	return held{unlock: func() error { return c.Del(ctx, key).Err() }}, err
}

func (c bareRedis) close() error { return c.Close() }

type redislockClient struct {
	redis *redis.Client
	*redislock.Client
	ttl time.Duration
}

func openRedislock(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := openRedis(rawURL)
	return redislockClient{c, redislock.New(c), ttl}, err
}

// lock asks again every 10 ms: often enough that all who want a lock get a share of it, and that a lock which is free
// is not left alone for long. The library itself has no default. Without a deadline it would give up after the TTL.
func (c redislockClient) lock(ctx context.Context, key string) (held, error) {
	wait, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	l, err := c.Obtain(wait, key, c.ttl, &redislock.Options{RetryStrategy: redislock.LinearBackoff(10 * time.Millisecond)})
	if err != nil {
		return held{}, err
	}
	return held{unlock: func() error { return l.Release(ctx) }}, nil
}

func (c redislockClient) close() error { return c.redis.Close() }

type redsyncClient struct {
	redis *redis.Client
	*redsync.Redsync
	ttl time.Duration
}

func openRedsync(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := openRedis(rawURL)
	return redsyncClient{c, redsync.New(goredis.NewPool(c)), ttl}, err
}

// lock asks again after the library's own random delay, here without the bound on tries.
func (c redsyncClient) lock(ctx context.Context, key string) (held, error) {
	m := c.NewMutex(key, redsync.WithExpiry(c.ttl), redsync.WithTries(1<<30))
	if err := m.LockContext(ctx); err != nil {
		return held{}, err
	}
	return held{unlock: func() error {
		if ok, err := m.UnlockContext(ctx); err != nil || !ok {
			return errors.Join(err, errors.New("unlock: not done"))
		}
		return nil
	}}, nil
}

func (c redsyncClient) close() error { return c.redis.Close() }

type rueidislockClient struct{ rueidislock.Locker }

func openRueidislock(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	host, err := hostOf(rawURL)
	if err != nil {
		return nil, err
	}
	l, err := rueidislock.NewLocker(rueidislock.LockerOption{
		ClientOption:   rueidis.ClientOption{InitAddress: []string{host}},
		KeyMajority:    1,
		KeyValidity:    ttl,
		ExtendInterval: ttl / 2, // the library's own default
		NoLoopTracking: true,
	})
	return rueidislockClient{l}, err
}

// lock: unlocking has no error, and is answered before the server has freed the key.
func (c rueidislockClient) lock(ctx context.Context, key string) (held, error) {
	own, cancel, err := c.WithContext(ctx, key)
	if err != nil {
		return held{}, err
	}
	return held{func() error { cancel(); return nil }, own.Done()}, nil
}

func (c rueidislockClient) close() error { c.Close(); return nil }

type redisMonitor struct {
	addr string
	info *redis.Client
}

func newRedisMonitor(_ context.Context, rawURL string) (monitor, error) {
	opts, err := redis.ParseURL(rawURL)
	if err != nil {
		return nil, err
	}
	opts.PoolSize, opts.MinIdleConns = 1, 1
	return &redisMonitor{opts.Addr, redis.NewClient(opts)}, nil
}

func (m *redisMonitor) close() error { return m.info.Close() }

func (m *redisMonitor) connections(ctx context.Context) (n int, err error) {
	info, err := m.info.Info(ctx, "clients").Result()
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(info, "connected_clients:")
	_, err = fmt.Sscan(rest, &n)
	return n, err
}

// commands: what scripts call is not counted, and the figures of INFO count it. So this listens to MONITOR, which marks
// those calls.
func (m *redisMonitor) commands(ctx context.Context, span time.Duration) (int64, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", m.addr)
	if err != nil {
		return 0, err
	}
	if _, err := conn.Write([]byte("MONITOR\r\n")); err != nil {
		return 0, err
	}
	var count atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(conn)
		lines.Buffer(make([]byte, 1<<20), 1<<20)
		for lines.Scan() { // ends when conn is closed
			line := lines.Bytes()
			if bytes.HasPrefix(line, []byte("+OK")) || bytes.Contains(line, []byte(" lua] ")) {
				continue
			}
			count.Add(1)
		}
	}()
	settle(ctx, span)
	n := count.Load()
	err = conn.Close()
	<-done
	return n, err
}
