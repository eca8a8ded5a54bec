package redisbackend

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

func init() {
	locker.Register("redis", open)
	locker.Register("rediss", open)
	locker.Register("redis+unix", open)
	locker.Register("redis+sentinel", openSentinel)
	locker.Register("rediss+sentinel", openSentinel)
	locker.Register("redis+cluster", openCluster)
	locker.Register("rediss+cluster", openCluster)
	locker.Register("redlock", openRedlock)
	locker.Register("redlocks", openRedlock)
}

// open makes a Backend with a client of its own from a URL:
//
//	redis://user:password@host:6379/0?prefix=app:
//	rediss://user:password@host:6379/0?ca=/etc/ssl/redis.pem
//	redis+unix://user:password@/run/redis/redis.sock?db=0
func open(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	settings, dialer, opts, err := fromURL(cfg)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	settings.Dialer = dialer.connect
	client := redis.NewClient(settings)
	closeClient := func() error {
		defer dialer.close()
		return client.Close()
	}
	b, err := newBackend(ctx, client, closeClient, opts)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: errors.Join(err, closeClient())}
	}
	return b, nil
}

// defaultDialTimeout bounds the making of a connection.
const defaultDialTimeout = 3 * time.Second

// ownClient are the settings of clients that are made from a URL.
func ownClient(cfg locker.Config) *redis.Options {
	password, _ := cfg.URL.User.Password()
	return &redis.Options{
		Network:               "tcp",
		Username:              cfg.URL.User.Username(),
		Password:              password,
		MaxRetries:            -1, // the Client knows better when to ask again
		ContextTimeoutEnabled: true,
		ReadTimeout:           maxPatience, // each batch has its own, shorter time-out
		WriteTimeout:          maxPatience,
		DialTimeout:           defaultDialTimeout,
		PoolSize:              maxBatches + 4, // and some for lists and the check of the server
		DisableIdentity:       true,
	}
}

// fromURL reads the settings. No error repeats what may be a password.
func fromURL(cfg locker.Config) (*redis.Options, *dialer, Options, error) {
	client := ownClient(cfg)
	params := cfg.URL.Query()
	var opts Options
	var ca string
	err := readParams(params, map[string]func(string) error{
		"db":           number(&client.DB, 0),
		"prefix":       text(&opts.Prefix),
		"replicas":     number(&opts.Replicas, 0),
		"pool_size":    number(&client.PoolSize, 1),
		"dial_timeout": duration(&client.DialTimeout),
		"ca":           text(&ca),
	})
	if err != nil {
		return nil, nil, opts, err
	}

	if cfg.URL.Scheme == "redis+unix" {
		if cfg.URL.Host != "" || cfg.URL.Path == "" {
			return nil, nil, opts, errors.New("the URL names no socket: write redis+unix:///path/of/the/socket?db=0")
		}
		client.Network, client.Addr = "unix", cfg.URL.Path
	} else {
		if client.Addr, err = address(cfg.URL); err != nil {
			return nil, nil, opts, err
		}
		if err := database(cfg.URL, client); err != nil {
			return nil, nil, opts, err
		}
	}
	secure, err := secured(cfg.URL, cfg.URL.Scheme == "rediss", ca)
	if err != nil {
		return nil, nil, opts, err
	}
	return client, newDialer(cfg, client.DialTimeout, secure), opts, nil
}

// database reads the database's number from the path.
func database(u *url.URL, client *redis.Options) error {
	db := strings.Trim(u.Path, "/")
	switch {
	case db == "":
		return nil
	case u.Query().Has("db"):
		return errors.New("the URL names a database twice: give it as path or as parameter db")
	}
	if err := number(&client.DB, 0)(db); err != nil {
		return fmt.Errorf("the URL's path is not the number of a database: write %s://host:6379/0", u.Scheme)
	}
	return nil
}

// secured are the settings of TLS for one host, or nil if the scheme is without.
func secured(u *url.URL, secure bool, ca string) (*tls.Config, error) {
	if !secure {
		if ca != "" {
			return nil, fmt.Errorf("the parameter ca is for TLS: write %s://", withTLS(u.Scheme))
		}
		return nil, nil
	}
	return tlsConfig(u.Hostname(), ca)
}

// withTLS is the scheme that means the same with TLS.
func withTLS(scheme string) string {
	if scheme == "redis+unix" {
		return "rediss"
	}
	kind, topology, found := strings.Cut(scheme, "+")
	if !found {
		return kind + "s"
	}
	return kind + "s+" + topology
}

// readParams hands each parameter to its reader.
func readParams(params url.Values, readers map[string]func(string) error) error {
	for param, values := range params {
		read, ok := readers[param]
		if !ok {
			known := make([]string, 0, len(readers))
			for name := range readers {
				known = append(known, name)
			}
			slices.Sort(known)
			// Its name is not told: it may be the rest of a password with an "&".
			return fmt.Errorf("a parameter is unknown: known are %s", strings.Join(known, ", "))
		}
		if len(values) != 1 {
			return fmt.Errorf("the parameter %s is given %d times", param, len(values))
		}
		if err := read(values[0]); err != nil {
			return fmt.Errorf("the parameter %s %w", param, err)
		}
	}
	return nil
}

func text(to *string) func(string) error {
	return func(value string) error {
		*to = value
		return nil
	}
}

func number(to *int, least int) func(string) error {
	return func(value string) error {
		n, err := strconv.Atoi(value)
		if err != nil || n < least {
			return fmt.Errorf("must be a number from %d", least)
		}
		*to = n
		return nil
	}
}

func duration(to *time.Duration) func(string) error {
	return func(value string) error {
		d, err := time.ParseDuration(value)
		if err != nil || d <= 0 {
			return errors.New("must be a duration such as 3s or 500ms")
		}
		*to = d
		return nil
	}
}

const redisPort = "6379"

// address adds what a URL may leave out.
func address(u *url.URL) (string, error) {
	if strings.Contains(u.Host, ",") {
		return "", errors.New("the URL names several hosts, and this backend is for one server")
	}
	host, port := u.Hostname(), u.Port()
	if host == "" {
		host = "localhost"
	}
	if port == "" {
		port = redisPort
	}
	return net.JoinHostPort(host, port), nil
}

// tlsConfig trusts the system's authorities, or those in a PEM file.
func tlsConfig(host, ca string) (*tls.Config, error) {
	if host == "" {
		host = "localhost"
	}
	secure := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if ca == "" {
		return secure, nil
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("the parameter ca: %w", err)
	}
	secure.RootCAs = x509.NewCertPool()
	if !secure.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("the parameter ca: %s has no certificate in PEM form", ca)
	}
	return secure, nil
}
