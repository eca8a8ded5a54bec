package servertest

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

// Redis is StartRedis for a test: it stops the server at the test's end, shows its log if the test has failed, and
// skips the test where Redis is not installed.
func Redis(tb testing.TB, opts RedisOptions) *Server {
	tb.Helper()
	return use(tb, "redis", func(ctx context.Context) (*Server, error) { return StartRedis(ctx, opts) })
}

func use(tb testing.TB, name string, start func(context.Context) (*Server, error)) *Server {
	tb.Helper()
	s, err := start(tb.Context())
	if errors.Is(err, ErrMissing) {
		Skip(tb, name, err.Error())
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() && s.Private() {
			tb.Logf("the last words of the %s server at %s:\n%s", name, s.Addr, s.Log())
		}
		if err := s.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// Skip skips the test for want of what LOCKER_TEST_REQUIRE calls name, or fails it if that is required.
func Skip(tb testing.TB, name, reason string) {
	tb.Helper()
	known := []string{"redis", "etcd", "postgres", "containers"}
	for _, required := range strings.FieldsFunc(os.Getenv("LOCKER_TEST_REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' }) {
		if !slices.Contains(known, required) {
			tb.Fatalf("LOCKER_TEST_REQUIRE names %q: it knows %s", required, strings.Join(known, ", "))
		}
		if required == name {
			tb.Fatalf("%s is required by LOCKER_TEST_REQUIRE, but: %s", name, reason)
		}
	}
	tb.Skip(reason)
}

// Postgres is StartPostgres for a test, as Redis is StartRedis.
func Postgres(tb testing.TB, opts PostgresOptions) *Server {
	tb.Helper()
	return use(tb, "postgres", func(ctx context.Context) (*Server, error) { return StartPostgres(ctx, opts) })
}
