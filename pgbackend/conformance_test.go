package pgbackend_test

import (
	"context"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/pgtest"
	"github.com/fec20105/locker/internal/servertest"
)

func TestMain(m *testing.M) {
	pgtest.Serve()
	examples, err := servertest.StartPostgres(context.Background(), servertest.PostgresOptions{})
	if err == nil {
		if exampleURL = examples.URL; !strings.Contains(exampleURL, "?") {
			exampleURL += "?connect_timeout=10" // so that tests can add parameters
		}
	} else {
		_ = flag.Set("test.skip", "^Example") // tests skip themselves, or fail
	}
	code := m.Run()
	if err == nil {
		_ = examples.Stop()
	}
	os.Exit(code)
}

// exampleURL is where examples, and tests that hurt no server, find a PostgreSQL.
var exampleURL string

func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	conformance.Run(t, pgtest.Harness(t, server, ""))
}

// TestConformanceWithoutDDL is about tokens that come from transactions.
func TestConformanceWithoutDDL(t *testing.T) {
	t.Parallel()
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	conformance.Run(t, pgtest.Harness(t, server, "&ddl=false"))
}

// TestConformanceBehindPooler is about a pooler that keeps clients on their sessions. The server is not restarted: a pooler has its own
// ideas of when to try it again.
func TestConformanceBehindPooler(t *testing.T) {
	t.Parallel()
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	pooler := servertest.PgBouncer(t, server, "session", "default_pool_size = 400", "max_client_conn = 1000")
	h := pgtest.HarnessAt(t, server, pooler.URL, "")
	h.Server = conformance.Server{Pause: server.Pause, Resume: server.Resume}
	conformance.Run(t, h)
}
