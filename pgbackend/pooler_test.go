package pgbackend_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/pgbackend"
)

// TestPoolerThatMovesSessions is refused, also if it has just one session, and if it is busy.
func TestPoolerThatMovesSessions(t *testing.T) {
	t.Parallel()
	server := start(t)
	for _, mode := range []string{"transaction", "statement"} {
		for _, size := range []string{"1", "5"} {
			t.Run(mode+size, func(t *testing.T) {
				t.Parallel()
				pooler := servertest.PgBouncer(t, server, mode, "default_pool_size = "+size, "server_round_robin = 1")
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err := locker.OpenLocker(ctx, pooler.URL, locker.Config{})
				mustSay(t, err, "set pool_mode=session")
				mustSay(t, err, "LockTx works")
				if left := ask(t, direct(t, server.URL), "SELECT objid::text FROM pg_locks WHERE locktype = 'advisory'"); len(left) > 0 {
					t.Errorf("there are locks left: %q", left)
				}
				if mode == "statement" {
					return
				}
				conn := direct(t, pooler.URL+"&default_query_exec_mode=simple_protocol")
				if err := pgbackend.LockTx(t.Context(), begin(t, conn), "k"); err != nil {
					t.Errorf("LockTx behind a pooler: %v", err)
				}
			})
		}
	}
}

// TestPoolerThatKeepsSessions works as if it was not there.
func TestPoolerThatKeepsSessions(t *testing.T) {
	t.Parallel()
	server := start(t)
	for _, c := range []struct{ name, line string }{
		{"as it comes", ""},
		{"drops parameters", "ignore_startup_parameters = idle_session_timeout,idle_in_transaction_session_timeout,statement_timeout,lock_timeout," +
			"default_transaction_isolation,plan_cache_mode,synchronous_commit"},
		{"cleans nothing up", "server_reset_query ="},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			pooler := servertest.PgBouncer(t, server, "session", c.line)
			more := "&prefix=" + pooler.Addr + ":"
			l, next, observer := open(t, pooler.URL+more), open(t, pooler.URL+more), open(t, server.URL+more)
			const ttl = time.Second

			client, err := locker.New(l, locker.WithTTL(ttl))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			lock := hold(t, client, "k")
			if _, err := observer.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
				t.Errorf("acquire of a lock that is held behind a pooler: %v, want ErrHeld", err)
			}
			waiting := waitAtServer(t, next, request("k"))
			select {
			case <-lock.Done():
				t.Errorf("lost under a heartbeat: %v", lock.Err())
			case <-time.After(ttl * 3 / 2):
			}
			if err := lock.Release(t.Context()); err != nil {
				t.Error(err)
			}
			release(t, next, granted(t, waiting))

			// A client that ends leaves its locks to the pooler, which must not keep them.
			gone := open(t, pooler.URL+more)
			acquire(t, gone, lasting(try("k"), ttl))
			closed := time.Now()
			if err := gone.Close(); err != nil {
				t.Fatal(err)
			}
			if took := gotBy(t, observer).Sub(closed); took > ttl+500*time.Millisecond {
				t.Errorf("a lock was free %v after its client was closed", took)
			}

			// The TTL is the server's, whatever the pooler does.
			lease, told := evictable(t, l, "k", ttl)
			at := gotBy(t, observer)
			if early := lease.Start.Add(ttl).Sub(at); early > 0 || early < -time.Second {
				t.Errorf("a lock with a TTL of %v was free %v too early", ttl, early)
			}
			select {
			case reason := <-told: // the end of a lock that nobody extends is no news
				if reason != locker.ReasonDisconnected {
					t.Errorf("told of a loss with the reason %v", reason)
				}
			default:
			}

			// The loss of the server's session is told through the pooler.
			lease, told = evictable(t, l, "evicted", long)
			session, ok, err := observer.InspectSession(t.Context(), "evicted")
			if err != nil || !ok {
				t.Fatalf("inspect: %v, %v", ok, err)
			}
			ask(t, direct(t, server.URL), "SELECT pg_terminate_backend($1)::text", session.PID)
			mustBeTold(t, told, locker.ReasonDisconnected, time.Second)
			if err := l.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
				t.Errorf("release after the end of the session: %v, want ErrLost", err)
			}
		})
	}
}

// TestPoolerWithoutSessions is about a pool of sessions that is used up: the error says so, in bounded time.
func TestPoolerWithoutSessions(t *testing.T) {
	t.Parallel()
	server := start(t)
	pooler := servertest.PgBouncer(t, server, "session", "default_pool_size = 2", "query_wait_timeout = 1")
	l := open(t, pooler.URL) // with one for itself, and one to find out about the pooler
	ask(t, direct(t, pooler.URL), "SELECT 'takes the other'")
	began := time.Now()
	_, err := l.Acquire(t.Context(), request("k"))
	mustSay(t, err, "query_wait_timeout")
	_, err = locker.OpenLocker(t.Context(), pooler.URL, locker.Config{})
	mustSay(t, err, "query_wait_timeout")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
}
