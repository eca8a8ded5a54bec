package etcdbackend

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
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/fec20105/locker"
)

func init() {
	locker.Register("etcd", open)
	locker.Register("etcds", open)
}

// open makes a Backend with a client of its own from a URL.
func open(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	settings, opts, err := fromURL(cfg)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	client, err := clientv3.New(*settings) // asks the servers only to log in
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no server has answered to the login within %v: check hosts and ports: %w", settings.DialTimeout, err)
	}
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: explain(err)}
	}
	b, err := newBackend(ctx, client, client.Close, opts)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: errors.Join(err, client.Close())}
	}
	return b, nil
}

const (
	defaultDialTimeout = 3 * time.Second
	// A connection that has carried nothing for keepaliveTime is probed, and given up after keepaliveTimeout. Less the
	// library does not allow.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
	// window is how much a server may send before it is read.
	window = 1 << 20
)

// fromURL reads the settings. No error repeats what may be a password.
func fromURL(cfg locker.Config) (*clientv3.Config, Options, error) {
	opts := Options{Prefix: strings.Trim(cfg.URL.Path, "/")}
	if opts.Prefix != "" {
		opts.Prefix += "/"
	}
	timeout := defaultDialTimeout
	var files tlsFiles
	err := readParams(cfg.URL.Query(), map[string]func(string) error{
		"dial_timeout": duration(&timeout),
		"ca":           text(&files.ca),
		"cert":         text(&files.cert),
		"key":          text(&files.key),
	})
	if err != nil {
		return nil, opts, err
	}
	password, hasPassword := cfg.URL.User.Password()
	user := cfg.URL.User.Username()
	if (user == "") != (password == "") || hasPassword && user == "" {
		return nil, opts, errors.New("the URL has a user without a password, or a password without a user: write etcd://user:password@host")
	}
	dial := cfg.Dial
	if dial == nil {
		dial = (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext
	}
	client := &clientv3.Config{
		Endpoints:            endpoints(cfg.URL),
		Username:             user,
		Password:             password,
		DialTimeout:          timeout, // for the login
		DialKeepAliveTime:    keepaliveTime,
		DialKeepAliveTimeout: keepaliveTimeout,
		Logger:               zapLogger(cfg.Logger),
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, timeout)
				defer cancel()
				return dial(ctx, "tcp", addr)
			}),
			// Windows of a fixed size: to find the best one the library pings after each answer.
			grpc.WithInitialWindowSize(window),
			grpc.WithInitialConnWindowSize(window),
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
				MinConnectTimeout: timeout,
			}),
		},
	}
	if cfg.URL.Scheme == "etcds" {
		if client.TLS, err = files.config(); err != nil {
			return nil, opts, err
		}
	} else if files != (tlsFiles{}) {
		return nil, opts, errors.New("the parameters ca, cert and key are for TLS: write etcds://")
	}
	return client, opts, nil
}

// endpoints adds what a URL may leave out.
func endpoints(u *url.URL) []string {
	list := strings.Split(u.Host, ",")
	for i, host := range list {
		one := url.URL{Host: host}
		name, port := one.Hostname(), one.Port()
		if name == "" {
			name = "localhost"
		}
		if port == "" {
			port = "2379"
		}
		list[i] = net.JoinHostPort(name, port)
	}
	return list
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

// tlsFiles are PEM files: the authority to trust, and a certificate of our own with its key.
type tlsFiles struct{ ca, cert, key string }

// config trusts the system's authorities unless another one is named. The library fills in each host's name.
func (f tlsFiles) config() (*tls.Config, error) {
	secure := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("the parameter ca: %w", err)
		}
		secure.RootCAs = x509.NewCertPool()
		if !secure.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the parameter ca: %s has no certificate in PEM form", f.ca)
		}
	}
	if (f.cert == "") != (f.key == "") {
		return nil, errors.New("the parameters cert and key belong together: give both")
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("the parameters cert and key: %w", err)
		}
		secure.Certificates = []tls.Certificate{pair}
	}
	return secure, nil
}
