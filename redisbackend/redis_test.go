package redisbackend_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

// long is a TTL that does not end while a test runs.
const long = time.Minute

// start starts a server. A private one may be hurt.
func start(t testing.TB, args ...string) *servertest.Server {
	t.Helper()
	return servertest.Redis(t, servertest.RedisOptions{Private: true, Args: args})
}

// open opens a Backend as another process would.
func open(t testing.TB, rawURL string) *redisbackend.Backend {
	t.Helper()
	return openConfig(t, rawURL, locker.Config{})
}

func openConfig(t testing.TB, rawURL string, cfg locker.Config) *redisbackend.Backend {
	t.Helper()
	return redistest.Open(t, rawURL, cfg)
}

// direct is a client without this package, to look behind it.
func direct(t testing.TB, server *servertest.Server) *redis.Client {
	t.Helper()
	return redistest.Direct(t, server)
}

func request(key string) locker.Request {
	return locker.Request{Key: key, ID: uuid.NewString(), TTL: long}
}

func try(key string) locker.Request {
	req := request(key)
	req.NoWait = true
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

// cleanUp is the lease by which a caller withdraws a request.
func cleanUp(req locker.Request) locker.Lease { return locker.Lease{Key: req.Key, ID: req.ID} }

// answer is what an Acquire in the background returned, and when.
type answer struct {
	lease locker.Lease
	err   error
	at    time.Time
}

// wait acquires in the background, and returns when the request stands in the queue as the n-th.
func wait(ctx context.Context, t testing.TB, l *redisbackend.Backend, req locker.Request, n int) <-chan answer {
	t.Helper()
	answered := make(chan answer, 1)
	go func() {
		lease, err := l.Acquire(ctx, req)
		answered <- answer{lease, err, time.Now()}
	}()
	eventually(t, "the request stands in the queue", func() bool { return waiters(t, l, req.Key) >= n })
	return answered
}

func waiters(t testing.TB, l *redisbackend.Backend, key string) int {
	t.Helper()
	holding, err := l.Inspect(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return holding.Waiters
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 30 s it is still not so that %s", what)
		}
	}
}

// granted waits for the end of a background Acquire.
func granted(t testing.TB, answered <-chan answer, within time.Duration) answer {
	t.Helper()
	select {
	case a := <-answered:
		if a.err != nil {
			t.Fatalf("acquire: %v", a.err)
		}
		return a
	case <-time.After(within):
		t.Fatalf("not granted within %v", within)
		return answer{}
	}
}
