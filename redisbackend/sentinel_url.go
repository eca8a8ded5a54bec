package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

// sentinelPort is where Sentinels listen if the URL does not say it.
const sentinelPort = "26379"

// openSentinel makes a Backend on the primary that Sentinels watch:
//
//	redis+sentinel://user:password@s1:26379,s2,s3/primary/0?prefix=app:&replicas=2
//	rediss+sentinel://s1,s2,s3/primary?ca=/etc/ssl/redis.pem&sentinel_user=locks&sentinel_password=…
//
// The user and the password are those of Redis.
func openSentinel(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	b, err := sentinelBackend(ctx, cfg)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	return b, nil
}

func sentinelBackend(ctx context.Context, cfg locker.Config) (*Backend, error) {
	settings, hosts, primary, opts, err := sentinelFromURL(cfg)
	if err != nil {
		return nil, err
	}
	data, control := settings.dialer, settings.control
	clients := make([]*redis.Client, len(hosts))
	for i, host := range hosts {
		clients[i] = redis.NewClient(settings.sentinel(host))
	}
	s := newSentinels(primary, clients, data)
	settings.redis.Addr, settings.redis.Dialer = "the primary", s.dial
	client := redis.NewClient(settings.redis)
	closeAll := func() error {
		var errs []error
		s.close(func() {
			errs = append(errs, client.Close())
			data.close()
			for _, c := range clients {
				errs = append(errs, c.Close())
			}
			control.close()
		})
		return errors.Join(errs...)
	}
	b, err := newBackend(ctx, client, closeAll, opts)
	if err != nil {
		return nil, errors.Join(err, closeAll())
	}
	b.outage = failoverTime
	b.copies = s.known()
	s.watch()
	return b, nil
}

// sentinelSettings are those of the connections to the primary and to the Sentinels.
type sentinelSettings struct {
	redis           *redis.Options
	user, password  string // of the Sentinels
	dialer, control *dialer
}

func (s *sentinelSettings) sentinel(addr string) *redis.Options {
	return &redis.Options{
		Addr:                  addr,
		Username:              s.user,
		Password:              s.password,
		Dialer:                s.control.connect,
		Protocol:              2, // Sentinels speak the other one only from Redis 7 on
		MaxRetries:            -1,
		ContextTimeoutEnabled: true,
		ReadTimeout:           sentinelTimeout,
		WriteTimeout:          sentinelTimeout,
		DialTimeout:           s.redis.DialTimeout,
		PoolSize:              4,
		DisableIdentity:       true,
	}
}

// sentinelFromURL reads the settings. No error repeats what may be a password.
func sentinelFromURL(cfg locker.Config) (s *sentinelSettings, hosts []string, primary string, opts Options, err error) {
	s = &sentinelSettings{redis: ownClient(cfg)}
	var ca string
	err = readParams(cfg.URL.Query(), map[string]func(string) error{
		"db":                number(&s.redis.DB, 0),
		"prefix":            text(&opts.Prefix),
		"replicas":          number(&opts.Replicas, 0),
		"pool_size":         number(&s.redis.PoolSize, 1),
		"dial_timeout":      duration(&s.redis.DialTimeout),
		"ca":                text(&ca),
		"sentinel_user":     text(&s.user),
		"sentinel_password": text(&s.password),
	})
	if err != nil {
		return nil, nil, "", opts, err
	}
	if hosts, err = hostList(cfg.URL, sentinelPort); err != nil {
		return nil, nil, "", opts, err
	}
	primary, db, _ := strings.Cut(strings.Trim(cfg.URL.Path, "/"), "/")
	if primary == "" {
		return nil, nil, "", opts, fmt.Errorf("the URL does not name the primary: write %s://s1,s2,s3/NAME, as in the Sentinels' configuration", cfg.URL.Scheme)
	}
	if db != "" && (cfg.URL.Query().Has("db") || number(&s.redis.DB, 0)(db) != nil) {
		return nil, nil, "", opts, fmt.Errorf("the URL's path is not the primary's name, or name and database: write %s://s1,s2,s3/NAME/0", cfg.URL.Scheme)
	}
	secure, err := secured(&url.URL{Scheme: cfg.URL.Scheme, Host: "-"}, cfg.URL.Scheme == "rediss+sentinel", ca)
	if err != nil {
		return nil, nil, "", opts, err
	}
	if secure != nil {
		secure.ServerName = "" // that of each host
	}
	s.dialer, s.control = newDialer(cfg, s.redis.DialTimeout, secure), newDialer(cfg, min(s.redis.DialTimeout, sentinelTimeout), secure)
	return s, hosts, primary, opts, nil
}

// hostList reads the hosts of a URL, and adds the port where there is none.
func hostList(u *url.URL, port string) (hosts []string, err error) {
	if u.Host == "" {
		return nil, fmt.Errorf("the URL names no servers: write %s://h1,h2,h3", u.Scheme)
	}
	for host := range strings.SplitSeq(u.Host, ",") {
		one := url.URL{Host: host}
		if one.Port() == "" {
			one.Host = strings.TrimSuffix(host, ":") + ":" + port
		}
		addr, err := address(&one)
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, addr)
	}
	return hosts, nil
}
