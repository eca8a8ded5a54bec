// Package pgtest hooks the conformance suite up to pgbackend, for servers of any kind: processes of this machine and
// containers.
package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/pgbackend"
)

// serveURL makes a test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_PGTEST_SERVE"

// Serve is the first call of a TestMain: it does not return in a process that conformance has started.
func Serve() {
	url := os.Getenv(serveURL)
	if url == "" {
		return
	}
	if err := conformance.Serve(context.Background(), Opener(url)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Process starts this program once more, to serve.
func Process(rawURL string) func(context.Context) *exec.Cmd {
	return func(ctx context.Context) *exec.Cmd {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
		return cmd
	}
}

// Opener opens the Lockers of the suite. The sessions of waiters can be cut alone.
func Opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
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

// Open opens a Backend as another process would.
func Open(tb testing.TB, rawURL string, cfg locker.Config) *pgbackend.Backend {
	tb.Helper()
	l, err := locker.OpenLocker(tb.Context(), rawURL, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return l.(*pgbackend.Backend)
}

// Harness is for a server that the suite hurts. More are parameters of the Lockers' URL: "&ddl=false".
func Harness(tb testing.TB, server *servertest.Server, more string) conformance.Harness {
	return HarnessAt(tb, server, server.URL, more)
}

// HarnessAt has Lockers that connect to an address, behind which there is the server.
func HarnessAt(tb testing.TB, server *servertest.Server, address, more string) conformance.Harness {
	const prefix = "conformance:"
	rawURL := address + "&prefix=" + prefix + more
	// The server is restarted by some rows: each look is on a connection of its own.
	query := func(ctx context.Context, sql string, args ...any) ([]string, error) {
		conn, err := pgx.Connect(ctx, server.URL)
		if err != nil {
			return nil, err
		}
		defer conn.Close(ctx)
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowTo[string])
	}
	operator := Open(tb, rawURL, locker.Config{})
	return conformance.Harness{
		TTL:   2 * time.Second,
		Open:  Opener(rawURL),
		Small: Opener(rawURL + "&waiters=1"),
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
		Process: Process(rawURL),
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			// But for the lock that says that the sequence of tokens needs no jump, which ends with its session.
			all, err = query(ctx, "SELECT l.classid || '/' || l.objid || ' of ' || a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "+
				"WHERE locktype = 'advisory' AND NOT (objsubid = 1 AND mode = 'ShareLock')")
			return all, all, err
		},
		Artifacts: tb.TempDir(),
	}
}
