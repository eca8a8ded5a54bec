package servertest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// RedisOptions asks for more than a plain server. Any of them makes it a private one.
type RedisOptions struct {
	Private  bool     // even if LOCKER_TEST_REDIS is set: the test hurts the server
	Password string   // clients must give it
	TLS      bool     // clients must speak TLS
	Args     []string // more of the server's own configuration: "--maxmemory", "1mb"
}

// StartRedis returns the server named by LOCKER_TEST_REDIS if that is set and the options are zero, else a private
// Redis or Valkey. The caller stops it.
func StartRedis(ctx context.Context, opts RedisOptions) (*Server, error) {
	private := opts.Private || opts.Password != "" || opts.TLS || len(opts.Args) > 0
	if given := os.Getenv("LOCKER_TEST_REDIS"); given != "" && !private {
		return givenRedis(ctx, given)
	}
	program, err := lookPath("apt-get install redis-server, brew install redis, or your system's package of Redis or Valkey",
		"redis-server", "valkey-server")
	if err != nil {
		return nil, err
	}
	var cert certificate
	if opts.TLS {
		if cert, err = newCertificate(); err != nil {
			return nil, err
		}
	}
	s, err := start(ctx, kind{
		name: "redis",
		prepare: func(folder string, port int) ([]string, error) {
			command := append([]string{program}, redisArgs(folder, port, opts)...)
			if !opts.TLS {
				return command, nil
			}
			return command, cert.write(certFile(folder), keyFile(folder))
		},
		ready: func(ctx context.Context, folder string) error {
			return pingRedis(ctx, "unix", redisSocket(folder), opts.Password)
		},
	})
	if err != nil {
		return nil, err
	}
	u := url.URL{Scheme: "redis", Host: s.Addr}
	if opts.TLS {
		u.Scheme = "rediss"
		s.TLS = &tls.Config{RootCAs: cert.pool, MinVersion: tls.VersionTLS12}
	}
	if opts.Password != "" {
		u.User = url.UserPassword("", opts.Password)
	}
	s.URL, s.Socket = u.String(), redisSocket(s.guard.folder)
	return s, nil
}

func redisSocket(folder string) string { return filepath.Join(folder, "redis.sock") }
func certFile(folder string) string    { return filepath.Join(folder, "cert.pem") }
func keyFile(folder string) string     { return filepath.Join(folder, "key.pem") }

func redisArgs(folder string, port int, opts RedisOptions) []string {
	args := []string{
		"--bind", "127.0.0.1",
		"--unixsocket", redisSocket(folder),
		"--dir", filepath.Join(folder, "data"),
		"--save", "",
		// Every write is handed to the kernel before it is answered, so a killed server comes back with all that it
		// has answered. To wait for the disk as well would only help against a crash of the whole machine.
		"--appendonly", "yes",
		"--appendfsync", "no",
	}
	if opts.TLS {
		args = append(args, "--port", "0", "--tls-port", strconv.Itoa(port), "--tls-auth-clients", "no",
			"--tls-cert-file", certFile(folder), "--tls-key-file", keyFile(folder))
	} else {
		args = append(args, "--port", strconv.Itoa(port))
	}
	if opts.Password != "" {
		args = append(args, "--requirepass", opts.Password)
	}
	return append(args, opts.Args...)
}

// pingRedis asks, for a process over the unix socket in the server's own folder: whoever answers there is the server that was started,
// and has all its other ports open, because it opens them before and ends if it cannot.
func pingRedis(ctx context.Context, network, addr, password string) error {
	_, err := askRedis(ctx, network, addr, password, "PING")
	// Other errors are those of a server that works as it was told to, for example as a replica without its primary.
	var refusal redisError
	if errors.As(err, &refusal) && !strings.HasPrefix(refusal.Error(), "LOADING") {
		return nil
	}
	return err
}

// givenRedis finds out whether anybody is there, so that a wrong address fails at once and in clear words.
func givenRedis(ctx context.Context, rawURL string) (*Server, error) {
	const name = "servertest: LOCKER_TEST_REDIS"
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.Scheme != "redis" && u.Scheme != "rediss" {
		return nil, errors.New(name + " is no URL of the form redis://[user:password@]host:port[/database]")
	}
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "6379")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s names a server that cannot be reached: %w", name, err)
	}
	return &Server{URL: rawURL, Addr: addr, kind: kind{name: "redis"}}, conn.Close()
}
