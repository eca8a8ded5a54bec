package pgbackend_test

import (
	"context"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/pgtest"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/pgbackend"
)

// long is a TTL that does not end while a test runs.
const long = time.Minute

// start starts a server that may be hurt.
func start(t testing.TB, args ...string) *servertest.Server {
	t.Helper()
	return servertest.Postgres(t, servertest.PostgresOptions{Private: true, Args: args})
}

// shared is the URL of a server that many tests use, with a prefix of the test's own.
func shared(t testing.TB) string {
	t.Helper()
	if exampleURL == "" {
		servertest.Skip(t, "postgres", "PostgreSQL is not installed")
	}
	return exampleURL + "&prefix=" + url.QueryEscape(t.Name()+":")
}

// open opens a Backend as another process would.
func open(t testing.TB, rawURL string) *pgbackend.Backend {
	t.Helper()
	return openConfig(t, rawURL, locker.Config{})
}

func openConfig(t testing.TB, rawURL string, cfg locker.Config) *pgbackend.Backend {
	t.Helper()
	return pgtest.Open(t, rawURL, cfg)
}

// collect reads rows of one text.
func collect(rows pgx.Rows) ([]string, error) { return pgx.CollectRows(rows, pgx.RowTo[string]) }

// direct is a connection without this package, to look behind it. Parameters of the package's own are taken out.
func direct(t testing.TB, rawURL string) *pgx.Conn {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	for _, own := range []string{"prefix", "waiters", "sequence", "ddl"} {
		query.Del(own)
	}
	u.RawQuery = query.Encode()
	conn, err := pgx.Connect(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// ask asks for one column of text.
func ask(t testing.TB, conn *pgx.Conn, sql string, args ...any) []string {
	t.Helper()
	rows, err := conn.Query(t.Context(), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	got, err := collect(rows)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return got
}

func request(key string) locker.Request {
	return locker.Request{Key: key, ID: uuid.NewString(), TTL: long}
}

func try(key string) locker.Request {
	req := request(key)
	req.NoWait = true
	return req
}

func lasting(req locker.Request, ttl time.Duration) locker.Request {
	req.TTL = ttl
	return req
}

func acquire(t testing.TB, l locker.Locker, req locker.Request) locker.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), req)
	if err != nil {
		t.Fatalf("acquire: %v", err)
	}
	return lease
}

func release(t testing.TB, l locker.Locker, lease locker.Lease) {
	t.Helper()
	if err := l.Release(t.Context(), lease); err != nil {
		t.Fatalf("release: %v", err)
	}
}

// answer is what an Acquire in the background returned, and when.
type answer struct {
	lease locker.Lease
	err   error
	at    time.Time
}

// wait acquires in the background.
func wait(ctx context.Context, l locker.Locker, req locker.Request) <-chan answer {
	answered := make(chan answer, 1)
	go func() {
		lease, err := l.Acquire(ctx, req)
		answered <- answer{lease, err, time.Now()}
	}()
	return answered
}

// waitAtServer acquires in the background, and returns when a session waits for the key at the server.
func waitAtServer(t testing.TB, l *pgbackend.Backend, req locker.Request) <-chan answer {
	t.Helper()
	answered := wait(t.Context(), l, req)
	eventually(t, "the request waits at the server", func() bool { return waiters(t, l, req.Key) > 0 })
	return answered
}

func waiters(t testing.TB, l *pgbackend.Backend, key string) int {
	t.Helper()
	holding, err := l.Inspect(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return holding.Waiters
}

// granted is the lease that a wait in the background ends with.
func granted(t testing.TB, answered <-chan answer) locker.Lease {
	t.Helper()
	select {
	case a := <-answered:
		if a.err != nil {
			t.Fatalf("a waiter: %v", a.err)
		}
		return a.lease
	case <-time.After(10 * time.Second):
		t.Fatal("a waiter was not granted the lock in 10 s")
		panic("unreachable")
	}
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s it is still not so that %s", what)
		}
	}
}

// tapped is a connection whose writes are looked at before they go out. What onWrite returns goes out, and then its
// error is the answer.
type tapped struct {
	net.Conn
	onWrite func(c *tapped, p []byte) ([]byte, error)
	role    string // "hold", "wait", "control", or "" before that is known
}

func (c *tapped) Write(p []byte) (int, error) {
	if c.role == "" {
		for _, role := range []string{"hold", "wait", "control"} {
			if strings.Contains(string(p), "locker "+role+" ") {
				c.role = role
			}
		}
	}
	out, err := c.onWrite(c, p)
	if _, writeErr := c.Conn.Write(out); writeErr != nil {
		return 0, writeErr
	}
	return len(p), err
}

// tap opens a Backend all of whose connections are tapped.
func tap(t testing.TB, rawURL string, onWrite func(c *tapped, p []byte) ([]byte, error)) *pgbackend.Backend {
	t.Helper()
	return openConfig(t, rawURL, locker.Config{Dial: dialTapped(onWrite)})
}

func dialTapped(onWrite func(c *tapped, p []byte) ([]byte, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		return &tapped{Conn: conn, onWrite: onWrite}, err
	}
}

// settings are those of a program that connects by itself.
func settings(t testing.TB, rawURL string) *pgx.ConnConfig {
	t.Helper()
	config, err := pgx.ParseConfig(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return config
}
