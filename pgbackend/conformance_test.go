package pgbackend_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/pgbackend"
)

// serveURL makes this test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_PGBACKEND_SERVE"

func TestMain(m *testing.M) {
	if url := os.Getenv(serveURL); url != "" {
		if err := conformance.Serve(context.Background(), opener(url)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
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

// opener opens the Lockers of the suite. The sessions of waiters can be cut alone.
func opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		net.LabelBy(func(written []byte) string {
			if bytes.Contains(written, []byte("locker wait ")) {
				return "notify"
			}
			return ""
		})
		return locker.OpenLocker(ctx, rawURL, locker.Config{Dial: net.DialContext})
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	conformance.Run(t, harness(t, server, ""))
}

// TestConformanceWithoutDDL is about tokens that come from transactions. It does not run beside the other suite: two of
// them are more than a small machine does in time.
func TestConformanceWithoutDDL(t *testing.T) {
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	conformance.Run(t, harness(t, server, "&ddl=false"))
}

// TestConformanceBehindPooler is about a pooler that keeps clients on their sessions. The server is not restarted: a pooler has its own
// ideas of when to try it again.
func TestConformanceBehindPooler(t *testing.T) {
	server := servertest.Postgres(t, servertest.PostgresOptions{Private: true})
	pooler := servertest.PgBouncer(t, server, "session", "default_pool_size = 400", "max_client_conn = 1000")
	h := harnessAt(t, server, pooler.URL, "")
	h.Server = conformance.Server{Pause: server.Pause, Resume: server.Resume}
	conformance.Run(t, h)
}

func harness(t *testing.T, server *servertest.Server, more string) conformance.Harness {
	return harnessAt(t, server, server.URL, more)
}

// harnessAt has Lockers that connect to an address, behind which there is the server.
func harnessAt(t *testing.T, server *servertest.Server, address, more string) conformance.Harness {
	const prefix = "conformance:"
	rawURL := address + "&prefix=" + prefix + more
	// The server is restarted by some rows: each look is on a connection of its own.
	query := func(ctx context.Context, sql string, args ...any) ([]string, error) {
		conn, err := connect(ctx, server)
		if err != nil {
			return nil, err
		}
		defer conn.Close(ctx)
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return nil, err
		}
		return collect(rows)
	}
	operator := open(t, rawURL)
	return conformance.Harness{
		TTL:   2 * time.Second,
		Open:  opener(rawURL),
		Small: opener(rawURL + "&waiters=1"),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			err := operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
			if errors.Is(err, locker.ErrLost) && time.Since(lease.Start) > lease.TTL {
				return nil // it has ended by itself meanwhile
			}
			return err
		},
		EndWait: func(ctx context.Context, waiting locker.Request) error {
			id := uint64(pgbackend.LockID(prefix, waiting.Key))
			for {
				ended, err := query(ctx, "SELECT pg_terminate_backend(pid)::text FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "+
					"AND classid::int8 = $1 AND objid::int8 = $2", int64(id>>32), int64(id&0xffffffff))
				if err != nil || len(ended) > 0 {
					return err
				}
			}
		},
		Server: conformance.Server{
			Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart, Wipe: server.Wipe,
		},
		Process: func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
			return cmd
		},
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			// But for the lock that says that the sequence of tokens needs no jump, which ends with its session.
			all, err = query(ctx, "SELECT l.classid || '/' || l.objid || ' of ' || a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "+
				"WHERE locktype = 'advisory' AND NOT (objsubid = 1 AND mode = 'ShareLock')")
			return all, all, err
		},
		Artifacts: t.TempDir(),
	}
}
