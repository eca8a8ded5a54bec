package main

import (
	"context"
	"errors"
	"net/url"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"

	"github.com/fec20105/locker"
	_ "github.com/fec20105/locker/redisbackend"
)

// A peer is a library, or a bare sequence of server commands, behind the few lines that make it comparable.
type peer struct {
	name string
	// open makes a client with connections of its own, as one process would.
	open func(ctx context.Context, rawURL string) (client, error)
	// floor peers do not wait for a lock that is held: they run only where nobody else wants it.
	floor bool
}

// client is what the scenarios need of a library.
type client interface {
	// lock waits for key and holds it under the library's own heartbeat, where it has one.
	lock(ctx context.Context, key string) (unlock func() error, err error)
	close() error
}

// ttl is the same for every library.
const ttl = 15 * time.Second

var redisPeers = []peer{
	{name: "locker", open: openLocker},
	{name: "SET NX PX, DEL", open: openBare, floor: true},
	{name: "redislock", open: openRedislock},
	{name: "redsync", open: openRedsync},
	{name: "rueidislock", open: openRueidislock},
}

type lockerClient struct{ *locker.Client }

func openLocker(ctx context.Context, rawURL string) (client, error) {
	c, err := locker.Open(ctx, rawURL, locker.WithTTL(ttl))
	return lockerClient{c}, err
}

func (c lockerClient) lock(ctx context.Context, key string) (func() error, error) {
	l, err := c.Acquire(ctx, key)
	if err != nil {
		return nil, err
	}
	return func() error { return l.Release(ctx) }, nil
}

func (c lockerClient) close() error { return c.Close() }

// openRedis makes the client that the three peers on go-redis share, with that library's own settings.
func openRedis(rawURL string) (*redis.Client, error) {
	opts, err := redis.ParseURL(rawURL)
	if err != nil {
		return nil, err
	}
	opts.PoolSize = 64 // room for every goroutine of the contended scenario
	return redis.NewClient(opts), nil
}

type bareClient struct{ *redis.Client }

func openBare(_ context.Context, rawURL string) (client, error) {
	c, err := openRedis(rawURL)
	return bareClient{c}, err
}

func (c bareClient) lock(ctx context.Context, key string) (func() error, error) {
	got, err := c.SetNX(ctx, key, "me", ttl).Result()
	if err == nil && !got {
		err = errors.New("held")
	}
	return func() error { return c.Del(ctx, key).Err() }, err
}

func (c bareClient) close() error { return c.Close() }

type redislockClient struct {
	redis *redis.Client
	*redislock.Client
}

func openRedislock(_ context.Context, rawURL string) (client, error) {
	c, err := openRedis(rawURL)
	return redislockClient{c, redislock.New(c)}, err
}

// lock asks again every 10 ms: often enough that all who want a lock get a share of it, and that a lock which is free
// is not left alone for long. The library itself has no default.
func (c redislockClient) lock(ctx context.Context, key string) (func() error, error) {
	l, err := c.Obtain(ctx, key, ttl, &redislock.Options{RetryStrategy: redislock.LinearBackoff(10 * time.Millisecond)})
	if err != nil {
		return nil, err
	}
	return func() error { return l.Release(ctx) }, nil
}

func (c redislockClient) close() error { return c.redis.Close() }

type redsyncClient struct {
	redis *redis.Client
	*redsync.Redsync
}

func openRedsync(_ context.Context, rawURL string) (client, error) {
	c, err := openRedis(rawURL)
	return redsyncClient{c, redsync.New(goredis.NewPool(c))}, err
}

// lock asks again after the library's own random delay, here without the bound on tries.
func (c redsyncClient) lock(ctx context.Context, key string) (func() error, error) {
	m := c.NewMutex(key, redsync.WithExpiry(ttl), redsync.WithTries(1<<30))
	if err := m.LockContext(ctx); err != nil {
		return nil, err
	}
	return func() error {
		if ok, err := m.UnlockContext(ctx); err != nil || !ok {
			return errors.Join(err, errors.New("unlock: not done"))
		}
		return nil
	}, nil
}

func (c redsyncClient) close() error { return c.redis.Close() }

type rueidislockClient struct{ rueidislock.Locker }

func openRueidislock(_ context.Context, rawURL string) (client, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	l, err := rueidislock.NewLocker(rueidislock.LockerOption{
		ClientOption:   rueidis.ClientOption{InitAddress: []string{u.Host}},
		KeyMajority:    1,
		KeyValidity:    ttl,
		NoLoopTracking: true,
	})
	return rueidislockClient{l}, err
}

// lock: unlocking has no error, and is answered before the server has freed the key.
func (c rueidislockClient) lock(ctx context.Context, key string) (func() error, error) {
	_, cancel, err := c.WithContext(ctx, key)
	if err != nil {
		return nil, err
	}
	return func() error { cancel(); return nil }, nil
}

func (c rueidislockClient) close() error { c.Close(); return nil }
