package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	_ "github.com/fec20105/locker/etcdbackend"
	_ "github.com/fec20105/locker/filebackend"
	"github.com/fec20105/locker/internal/servertest"
	_ "github.com/fec20105/locker/pgbackend"
	_ "github.com/fec20105/locker/redisbackend"
)

// target is what is tortured: servers that this program has started, or those of a URL, which it leaves alone.
type target struct {
	name, url string
	given     bool // by its URL
	members   []*servertest.Server
	warmUp    time.Duration // until new servers grant anything
	stop      func() error
}

// starter starts servers.
type starter struct {
	name  string
	start func(ctx context.Context, ttl time.Duration) (*target, error)
}

// backends are those that this program can start.
var backends = []starter{
	{"redis", func(ctx context.Context, _ time.Duration) (*target, error) {
		return single(servertest.StartRedis(ctx, servertest.RedisOptions{Private: true}))
	}},
	{"redlock", startRedlock},
	{"etcd", func(ctx context.Context, _ time.Duration) (*target, error) {
		c, err := servertest.StartEtcdCluster(ctx, 3)
		if err != nil {
			return nil, err
		}
		return &target{url: c.URL, members: c.Members, stop: c.Stop}, nil
	}},
	{"postgres", func(ctx context.Context, _ time.Duration) (*target, error) {
		return single(servertest.StartPostgres(ctx, servertest.PostgresOptions{Private: true}))
	}},
	{"file", startFile},
}

func backendNames() string {
	var names []string
	for _, b := range backends {
		names = append(names, b.name)
	}
	return strings.Join(names, ",")
}

func single(s *servertest.Server, err error) (*target, error) {
	if err != nil {
		return nil, err
	}
	return &target{url: s.URL, members: []*servertest.Server{s}, stop: s.Stop}, nil
}

func startRedlock(ctx context.Context, ttl time.Duration) (*target, error) {
	g, err := servertest.StartRedisGroup(ctx, 5)
	if err != nil {
		return nil, err
	}
	// The servers keep what they have answered through every crash that this program can cause.
	quarantine := max(time.Second, 2*ttl)
	url := fmt.Sprintf("%s?durable=true&quarantine=%v", g.URL, quarantine)
	return &target{url: url, members: g.Members, warmUp: quarantine, stop: g.Stop}, nil
}

// startFile makes a folder in memory, where the system has that: on a disk every step waits for the journal.
func startFile(context.Context, time.Duration) (*target, error) {
	folder, err := os.MkdirTemp("/dev/shm", "locker-torture-")
	if err != nil {
		folder, err = os.MkdirTemp("", "locker-torture-")
	}
	if err != nil {
		return nil, err
	}
	return &target{url: "file://" + folder, stop: func() error { return os.RemoveAll(folder) }}, nil
}

// open opens a Locker whose traffic goes through net. A backend without connections is wrapped.
func open(ctx context.Context, url string, net *conformance.Network) (locker.Locker, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	l, err := locker.OpenLocker(ctx, url, locker.Config{Dial: net.DialContext})
	if err == nil && strings.HasPrefix(url, "file:") {
		l = net.Wrap(l)
	}
	return l, err
}

// wait waits until the locks can be used, and tells what is promised of them.
func (t *target) wait(ctx context.Context, key string) (caps locker.Capabilities, err error) {
	net := conformance.NewNetwork()
	l, err := open(ctx, t.url, net)
	if err != nil {
		return caps, err
	}
	defer func() { err = errors.Join(err, l.Close(), net.Close()) }()
	for until := time.Now().Add(2 * t.warmUp); ; pause(ctx, 50*time.Millisecond) {
		if err := tryLock(ctx, l, key); err == nil || time.Now().After(until) || ctx.Err() != nil {
			return l.Capabilities(), err
		}
	}
}

// tryLock acquires a key and gives it back.
func tryLock(ctx context.Context, l locker.Locker, key string) error {
	client, err := locker.New(l, locker.WithHolder("torture, looking"))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lock, err := client.Acquire(ctx, key, locker.WithNoWait())
	if err != nil {
		return err
	}
	return lock.Release(ctx)
}

// pause lets time pass, and is false if ctx ends meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
