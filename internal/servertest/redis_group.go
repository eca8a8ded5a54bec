package servertest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
)

// RedisGroup is several Redis servers.
type RedisGroup struct {
	Members []*Server
	URL     string // what locker.Open takes
}

// StartRedisGroup starts private servers that know nothing of each other. The caller stops them.
func StartRedisGroup(ctx context.Context, members int, args ...string) (*RedisGroup, error) {
	g := &RedisGroup{Members: make([]*Server, members)}
	errs := make([]error, members)
	var all sync.WaitGroup
	for i := range g.Members {
		all.Go(func() { g.Members[i], errs[i] = StartRedis(ctx, RedisOptions{Private: true, Args: args}) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, g.Stop())
	}
	addrs := make([]string, members)
	for i, m := range g.Members {
		addrs[i] = m.Addr
	}
	g.URL = "redlock://" + strings.Join(addrs, ",")
	return g, nil
}

// Each does the same to all members, at the same time.
func (g *RedisGroup) Each(do func(*Server) error) error {
	errs := make([]error, len(g.Members))
	var all sync.WaitGroup
	for i, m := range g.Members {
		all.Go(func() { errs[i] = do(m) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// Stop stops all members.
func (g *RedisGroup) Stop() error {
	var errs []error
	for _, m := range g.Members {
		if m != nil {
			errs = append(errs, m.Stop())
		}
	}
	return errors.Join(errs...)
}

// RedisServers is a group of independent servers for a test, as Redis is one.
func RedisServers(tb testing.TB, members int, args ...string) *RedisGroup {
	tb.Helper()
	return useGroup(tb, func(ctx context.Context) (*RedisGroup, error) { return StartRedisGroup(ctx, members, args...) })
}

func useGroup(tb testing.TB, start func(context.Context) (*RedisGroup, error)) *RedisGroup {
	tb.Helper()
	g, err := start(tb.Context())
	if errors.Is(err, ErrMissing) {
		Skip(tb, "redis", err.Error())
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		for _, m := range g.Members {
			if tb.Failed() {
				tb.Logf("the last words of the redis server at %s:\n%s", m.Addr, m.Log())
			}
		}
		if err := g.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return g
}
