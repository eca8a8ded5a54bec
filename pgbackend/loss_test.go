package pgbackend_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/pgtest"
)

// gotBy polls until the observer is granted the key "k", and returns when that was.
func gotBy(t testing.TB, observer locker.Locker) time.Time {
	t.Helper()
	var lease locker.Lease
	var at time.Time
	eventually(t, "the lock is free", func() bool {
		var err error
		lease, err = observer.Acquire(t.Context(), try("k"))
		at = time.Now()
		if err != nil && !errors.Is(err, locker.ErrHeld) {
			t.Fatal(err)
		}
		return err == nil
	})
	release(t, observer, lease)
	return at
}

// TestStoppedClient stops a process that holds a lock under a heartbeat.
func TestStoppedClient(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	observer := open(t, rawURL)
	const ttl = 2 * time.Second

	cmd := pgtest.Process(rawURL)(t.Context())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	answers := json.NewDecoder(out)
	do := func(command string) (answer struct {
		Error    string
		Lost     bool
		Deadline time.Time
	},
	) {
		t.Helper()
		if _, err := fmt.Fprintf(in, "{%s,\"Key\":\"k\"}\n", command); err != nil {
			t.Fatal(err)
		}
		if err := answers.Decode(&answer); err != nil {
			t.Fatal(err)
		}
		return answer
	}
	if a := do(fmt.Sprintf(`"Do":"acquire","TTL":%d`, ttl)); a.Error != "" {
		t.Fatal(a.Error)
	}
	held := time.NewTimer(ttl) // with heartbeats
	for done := false; !done; {
		select {
		case <-held.C:
			done = true
		default:
			if _, err := observer.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
				t.Fatalf("got %v, want ErrHeld", err)
			}
		}
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	at := gotBy(t, observer)
	if took := at.Sub(stopped); took > ttl+time.Second {
		t.Errorf("a stopped client kept its lock for %v: want at most TTL + 1 s", took)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	a := do(`"Do":"err"`)
	if !a.Lost {
		t.Errorf("when it goes on its first Err says %q: want a loss", a.Error)
	}
	if a.Deadline.After(at) {
		t.Errorf("its deadline was %v after another was granted the lock", a.Deadline.Sub(at))
	}
}

// TestHalfOpenClient cuts a client off: the server hears nothing more, not even the end of the connection.
func TestHalfOpenClient(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	observer := open(t, rawURL)
	const ttl = 2 * time.Second
	link := conformance.NewNetwork()
	t.Cleanup(func() { _ = link.Close() })
	client, err := locker.New(openConfig(t, rawURL, locker.Config{Dial: link.DialContext}), locker.WithTTL(ttl), locker.WithReleaseTimeout(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	lock, err := client.Acquire(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	link.Cut()
	cut := time.Now()
	told := make(chan time.Time, 1)
	go func() {
		<-lock.Done()
		told <- time.Now()
	}()
	at := gotBy(t, observer)
	if took := at.Sub(cut); took > ttl+time.Second {
		t.Errorf("a client that was cut off kept its lock for %v: want at most TTL + 1 s", took)
	}
	select {
	case when := <-told:
		t.Logf("told %v after the cut, the lock was free %v after it", when.Sub(cut), at.Sub(cut))
	default:
		t.Errorf("another was granted the lock, and the holder was not told")
	}
	if err := lock.Err(); !errors.Is(err, locker.ErrLost) || lock.Deadline().After(at) {
		t.Errorf("Err says %v, the deadline was %v after the other's grant", err, lock.Deadline().Sub(at))
	}
}

// TestHeartbeatIsCut cuts links in the middle of a heartbeat, at every byte of it. The server has got a part of a message then, and
// must end the session all the same.
func TestHeartbeatIsCut(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	observer := open(t, rawURL)
	const ttl = time.Second
	const heartbeat = len("Qnnnn" + "EXECUTE locker_pulse\x00")
	var all sync.WaitGroup
	for sent := range heartbeat {
		all.Go(func() {
			key := fmt.Sprint("k", sent)
			var cutting, cut atomic.Bool
			l := tap(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
				switch {
				case cut.Load():
					return nil, nil // half-open: nothing arrives any more
				case cutting.Load() && strings.Contains(string(p), "locker_pulse"):
					if len(p) != heartbeat {
						t.Errorf("a heartbeat has %d bytes, not %d", len(p), heartbeat)
					}
					cut.Store(true)
					return p[:sent], nil
				}
				return p, nil
			})
			lease, err := l.Acquire(t.Context(), lasting(request(key), ttl))
			if err != nil {
				t.Errorf("acquire: %v", err)
				return
			}
			cutting.Store(true)
			began := time.Now()
			go func() { _, _ = l.Extend(t.Context(), lease) }() // is not answered before the session is given up
			for {
				_, err := observer.Acquire(t.Context(), try(key))
				if err == nil {
					break
				}
				if took := time.Since(began); took > ttl+time.Second || !errors.Is(err, locker.ErrHeld) {
					t.Errorf("cut after %d bytes of a heartbeat: after %v still %v", sent, took, err)
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
			if early := time.Until(lease.Start.Add(ttl)); early > 0 {
				t.Errorf("cut after %d bytes of a heartbeat: free %v too early", sent, early)
			}
		})
	}
	all.Wait()
}

// evictable acquires a lock and returns how its loss is told.
func evictable(t testing.TB, l locker.Locker, key string, ttl time.Duration) (locker.Lease, <-chan locker.Reason) {
	t.Helper()
	told := make(chan locker.Reason, 1)
	req := lasting(request(key), ttl)
	req.Lost = func(reason locker.Reason) { told <- reason }
	return acquire(t, l, req), told
}

func mustBeTold(t testing.TB, told <-chan locker.Reason, want locker.Reason, within time.Duration) {
	t.Helper()
	select {
	case reason := <-told:
		if reason != want {
			t.Errorf("lost with the reason %v, want %v", reason, want)
		}
	case <-time.After(within):
		t.Errorf("not told of the loss in %v", within)
	}
}

// TestSessionIsEnded is about administrators who end the session that holds a lock.
func TestSessionIsEnded(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	l := open(t, rawURL)
	admin := direct(t, rawURL)
	lease, told := evictable(t, l, "k", long)
	session, ok, err := l.InspectSession(t.Context(), "k")
	if err != nil || !ok {
		t.Fatalf("the session of a held lock: %v, %v", ok, err)
	}
	ask(t, admin, "SELECT pg_terminate_backend($1)::text", session.PID)
	mustBeTold(t, told, locker.ReasonDisconnected, time.Second)
	if _, err := l.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend after the end of the session: %v, want ErrLost", err)
	}
	if err := l.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release after the end of the session: %v, want ErrLost", err)
	}
	next := acquire(t, l, try("k"))
	if next.Token <= lease.Token {
		t.Errorf("token %d follows %d", next.Token, lease.Token)
	}
	release(t, l, next)
}

// withRole makes the role app, who may log in and use the database, and returns its URL.
func withRole(t testing.TB, rawURL, more string) string {
	t.Helper()
	admin := direct(t, rawURL)
	if _, err := admin.Exec(t.Context(), "CREATE ROLE app LOGIN "+more); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User("app")
	return u.String()
}

// TestRoleHasSettings is about a role, and a database, whose settings an administrator has made: they must not change what a TTL means.
func TestRoleHasSettings(t *testing.T) {
	t.Parallel()
	server := start(t)
	rawURL := withRole(t, server.URL, "")
	admin := direct(t, server.URL)
	for _, sql := range []string{
		"ALTER ROLE app SET idle_session_timeout = '300ms'", "ALTER ROLE app SET statement_timeout = '1ms'", "ALTER ROLE app SET lock_timeout = '1ms'",
		"ALTER ROLE app SET default_transaction_isolation = 'serializable'", "ALTER ROLE app SET plan_cache_mode = 'force_custom_plan'",
		"ALTER DATABASE postgres SET idle_session_timeout = '250ms'", "ALTER DATABASE postgres SET search_path = ''", "ALTER ROLE app SET application_name = 'mine'",
		"GRANT CREATE ON SCHEMA public TO app", "ALTER ROLE app SET DateStyle = 'German'", "ALTER ROLE app SET intervalstyle = 'iso_8601'",
		"ALTER ROLE app SET client_encoding = 'SQL_ASCII'", "ALTER ROLE app SET standard_conforming_strings = off",
	} {
		if _, err := admin.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	l, next := open(t, rawURL), open(t, rawURL)
	const ttl = time.Second
	lease, told := evictable(t, l, "k", ttl)
	answered := wait(t.Context(), next, request("k"))
	select {
	case <-answered:
		t.Error("a waiter was granted a lock that is held")
	case reason := <-told:
		t.Errorf("lost with the reason %v", reason)
	case <-time.After(time.Until(lease.Start.Add(ttl * 3 / 4))):
	}
	if _, err := l.Extend(t.Context(), lease); err != nil {
		t.Errorf("extend: %v", err)
	}
	release(t, l, lease)
	release(t, next, granted(t, answered))
}

// TestRoleLosesRights takes from a role first the sequence of tokens and then the right to log in. What it holds stays.
func TestRoleLosesRights(t *testing.T) {
	t.Parallel()
	server := start(t)
	rawURL := withRole(t, server.URL, "")
	observer := open(t, server.URL) // creates the sequence
	admin := direct(t, server.URL)
	sql := func(sql string) {
		t.Helper()
		if _, err := admin.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	_, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	mustSay(t, err, `GRANT USAGE, SELECT, UPDATE ON SEQUENCE "public"."locker_tokens" TO app`)

	sql("GRANT USAGE, SELECT, UPDATE ON SEQUENCE public.locker_tokens TO app")
	l := open(t, rawURL)
	lease := acquire(t, l, request("held"))
	sql("REVOKE ALL ON SEQUENCE public.locker_tokens FROM app")
	_, err = l.Acquire(t.Context(), request("refused"))
	mustSay(t, err, "lacks a right")
	release(t, observer, acquire(t, observer, try("refused"))) // nothing is left

	sql("ALTER ROLE app NOLOGIN")
	_, err = l.Acquire(t.Context(), lasting(request("another session"), 20*time.Second))
	mustSay(t, err, "not permitted to log in")
	if _, err := l.Extend(t.Context(), lease); err != nil {
		t.Errorf("extending what is held: %v", err)
	}
	release(t, l, lease)

	sql("ALTER ROLE app LOGIN; GRANT USAGE, SELECT, UPDATE ON SEQUENCE public.locker_tokens TO app")
	release(t, l, acquire(t, l, try("refused")))
	release(t, l, acquire(t, l, lasting(try("another session"), 20*time.Second)))
}

// mustSay expects an error that has these words, and no password.
func mustSay(t testing.TB, err error, words string) {
	t.Helper()
	switch {
	case err == nil:
		t.Errorf("no error: want one with %q", words)
	case !strings.Contains(err.Error(), words):
		t.Errorf("the error is %q: want %q in it", err, words)
	case strings.Contains(err.Error(), "secret"):
		t.Errorf("the error tells the password: %v", err)
	}
	if e := (*locker.Error)(nil); err != nil && !errors.As(err, &e) {
		t.Errorf("the error %v is no *locker.Error", err)
	}
}
