package servertest

import "context"

// Remote is a private server that something else than this package runs, such as a container. Its methods are called one at
// a time, and do what those of Server do.
type Remote interface {
	Pause(context.Context) error
	Resume(context.Context) error
	Crash(context.Context) error
	Wipe(context.Context) error
	Restart(context.Context) error
	Kill(context.Context) error
	Start(context.Context) error
	Down() bool // it is paused, or was killed
	Log() string
	Stop() error
}

// NewRemote makes a Server of one that is run elsewhere and serves. The name is that of its sort, as in LOCKER_TEST_REQUIRE.
func NewRemote(name, rawURL, addr string, remote Remote) *Server {
	return &Server{URL: rawURL, Addr: addr, kind: kind{name: name}, remote: remote}
}

// RedisServes answers nil once a Redis without a password serves clients at host:port.
func RedisServes(ctx context.Context, addr string) error { return pingRedis(ctx, "tcp", addr, "") }

// EtcdServes answers nil once an etcd serves clients at host:port, and knows a leader.
func EtcdServes(ctx context.Context, addr string) error {
	return (&etcdAPI{scheme: "http", addr: addr}).healthy(ctx)
}

// PostgresServes answers nil once a PostgreSQL serves clients at host:port.
func PostgresServes(ctx context.Context, addr string) error { return pingPostgres(ctx, "tcp", addr) }
