package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/fec20105/locker"
)

// openCluster makes a Backend on a Redis Cluster, of which the URL names some servers:
//
//	redis+cluster://user:password@h1:6379,h2,h3?prefix=app:&replicas=1
//	rediss+cluster://h1,h2,h3?ca=/etc/ssl/redis.pem
func openCluster(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	b, err := clusterBackend(ctx, cfg)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	return b, nil
}

func clusterBackend(ctx context.Context, cfg locker.Config) (*Backend, error) {
	settings := ownClient(cfg)
	var opts Options
	var ca string
	err := readParams(cfg.URL.Query(), map[string]func(string) error{
		"prefix":       text(&opts.Prefix),
		"replicas":     number(&opts.Replicas, 0),
		"pool_size":    number(&settings.PoolSize, 1),
		"dial_timeout": duration(&settings.DialTimeout),
		"ca":           text(&ca),
	})
	if err != nil {
		return nil, err
	}
	hosts, err := hostList(cfg.URL, redisPort)
	if err != nil {
		return nil, err
	}
	if path := strings.Trim(cfg.URL.Path, "/"); path != "" && path != "0" {
		return nil, fmt.Errorf("a cluster has no databases but 0: write %s://h1,h2,h3 without a path", cfg.URL.Scheme)
	}
	secure, err := secured(&url.URL{Scheme: cfg.URL.Scheme, Host: "-"}, cfg.URL.Scheme == "rediss+cluster", ca)
	if err != nil {
		return nil, err
	}
	if secure != nil {
		secure.ServerName = "" // that of each server
	}
	dialer := newDialer(cfg, settings.DialTimeout, secure)
	settings.Dialer = dialer.connect
	s := newShards(hosts, settings, opts.Replicas)
	return newClusterBackend(ctx, s, opts, dialer.close)
}

// newClusterBackend makes a Backend on shards, which are closed with it. closeDials, if not nil, is called last.
func newClusterBackend(ctx context.Context, s *shards, opts Options, closeDials func()) (*Backend, error) {
	closeAll := func() error {
		err := s.closeClients()
		if closeDials != nil {
			closeDials()
		}
		return err
	}
	b, err := prepare(opts)
	if err == nil {
		err = s.check(ctx, b.prefix)
	}
	if err != nil {
		s.close()
		err = errors.Join(err, closeAll())
		s.wait()
		return nil, err
	}
	b.outage, b.copies = failoverTime, s.known()
	b.start(s, s, closeAll)
	b.servers = s.servers
	return b, nil
}

// check finds out early what would go wrong later.
func (s *shards) check(ctx context.Context, prefix string) error {
	if len(s.seeds) == 0 && s.given == nil {
		return errors.New("the client names no servers")
	}
	bounded, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if err := s.load(bounded); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if strings.Contains(err.Error(), "cluster support disabled") {
			return fmt.Errorf("the server is not one of a cluster: write redis:// for one server: %w", err)
		}
		return err
	}
	s.mu.Lock()
	client := s.anyone().client
	s.mu.Unlock()
	if err := checkServer(ctx, client); err != nil {
		return err
	}
	return checkChannels(ctx, client, prefix)
}
