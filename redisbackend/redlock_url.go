package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

// openRedlock makes a Redlock with clients of its own from a URL:
//
//	redlock://user:password@h1:6379,h2,h3/0?prefix=app:&quarantine=2m&durable=true
//	redlocks://h1,h2,h3,h4,h5?ca=/etc/ssl/redis.pem
func openRedlock(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	settings, dialers, opts, err := redlockFromURL(cfg)
	if err != nil {
		return nil, redlockError("open", "", err)
	}
	closeDials := func() {
		for _, d := range dialers {
			d.close()
		}
	}
	r, err := newRedlock(ctx, settings, closeDials, opts)
	if err != nil {
		closeDials()
		return nil, redlockError("open", "", err)
	}
	return r, nil
}

// redlockFromURL reads the settings, one for each host. No error repeats what may be a password.
func redlockFromURL(cfg locker.Config) (settings []*redis.Options, dialers []*dialer, opts RedlockOptions, err error) {
	common := ownClient(cfg)
	var ca string
	err = readParams(cfg.URL.Query(), map[string]func(string) error{
		"db":           number(&common.DB, 0),
		"prefix":       text(&opts.Prefix),
		"quarantine":   duration(&opts.Quarantine),
		"durable":      truth(&opts.Durable),
		"pool_size":    number(&common.PoolSize, 1),
		"dial_timeout": duration(&common.DialTimeout),
		"ca":           text(&ca),
	})
	if err != nil {
		return nil, nil, opts, err
	}
	if strings.Contains(cfg.URL.Path, "//") || strings.HasSuffix(cfg.URL.Host, ":") {
		return nil, nil, opts, fmt.Errorf("the URL has a scheme within: all servers have the first one, %s://h1,h2,h3", cfg.URL.Scheme)
	}
	if err := database(cfg.URL, common); err != nil {
		return nil, nil, opts, err
	}
	if cfg.URL.Host == "" {
		return nil, nil, opts, errors.New("the URL names no servers: write redlock://h1,h2,h3")
	}
	for host := range strings.SplitSeq(cfg.URL.Host, ",") {
		one := url.URL{Scheme: cfg.URL.Scheme, Host: host}
		own := *common
		if own.Addr, err = address(&one); err != nil {
			return nil, nil, opts, err
		}
		secure, err := secured(&one, cfg.URL.Scheme == "redlocks", ca)
		if err != nil {
			return nil, nil, opts, err
		}
		d := newDialer(cfg, own.DialTimeout, secure)
		own.Dialer = d.connect
		settings, dialers = append(settings, &own), append(dialers, d)
	}
	return settings, dialers, opts, nil
}

func truth(to *bool) func(string) error {
	return func(value string) error {
		b, err := strconv.ParseBool(value)
		if err != nil {
			return errors.New("must be true or false")
		}
		*to = b
		return nil
	}
}
