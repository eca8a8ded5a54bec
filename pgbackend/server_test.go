package pgbackend_test

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/pgbackend"
)

// refused opens a Backend, which must fail soon and in clear words.
func refused(t testing.TB, rawURL, words string) {
	t.Helper()
	began := time.Now()
	l, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	if err == nil {
		_ = l.Close()
	}
	mustSay(t, err, words)
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("the error took %v", took)
	}
}

// TestServerRefuses is about servers that cannot be used.
func TestServerRefuses(t *testing.T) {
	t.Parallel()
	server := servertest.Postgres(t, servertest.PostgresOptions{HBA: "local all all trust\nhost all postgres 127.0.0.1/32 trust\n" +
		"host all app 127.0.0.1/32 scram-sha-256\n"})
	withRole(t, server.URL, "PASSWORD 'rightsecret'")
	at := server.Addr + "/postgres?sslmode=disable"

	refused(t, "postgres://app:wrongsecret@"+at, "refuses this user or password")
	refused(t, "postgres://app@"+at, "password")
	refused(t, "postgres://nobody:secret@"+at, "refuses this user or password")
	refused(t, "postgres://postgres:secret@"+server.Addr+"/nothing?sslmode=disable", "name another in the URL's path")
	refused(t, "postgres://postgres:secret@"+server.Addr+"/postgres?sslmode=require", "TLS")

	app := open(t, "postgres://app:rightsecret@"+at) // may not create the sequence, and works without
	release(t, app, acquire(t, app, request("k")))

	for _, address := range []string{"127.0.0.1:1", "nowhere.invalid:5432"} {
		refused(t, "postgres://postgres:secret@"+address+"/postgres?sslmode=disable", "cannot connect")
	}
}

// TestServerIsNone is about addresses at which something else answers, or nothing.
func TestServerIsNone(t *testing.T) {
	t.Parallel()
	for name, serve := range map[string]func(net.Conn){
		"says nothing":     func(net.Conn) { <-t.Context().Done() },
		"closes":           func(c net.Conn) {},
		"speaks otherwise": func(c net.Conn) { _, _ = c.Write([]byte("-ERR unknown command\r\n")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			refused(t, "postgres://postgres:secret@"+listen(t, serve)+"/postgres?sslmode=disable&connect_timeout=1", "cannot connect")
		})
	}
}

// listen serves each connection at an address until the test ends.
func listen(t testing.TB, serve func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return l.Addr().String()
}

// answers is a server that answers every statement with one row.
func answers(row ...string) func(net.Conn) {
	return func(c net.Conn) {
		b := pgproto3.NewBackend(c, c)
		if _, err := b.ReceiveStartupMessage(); err != nil {
			return
		}
		b.Send(&pgproto3.AuthenticationOk{})
		b.Send(&pgproto3.BackendKeyData{ProcessID: 4711, SecretKey: []byte{0, 0, 0, 1}})
		for {
			b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
			if b.Flush() != nil {
				return
			}
			if _, err := b.Receive(); err != nil {
				return
			}
			values := make([][]byte, len(row))
			for i, value := range row {
				values[i] = []byte(value)
			}
			b.Send(&pgproto3.DataRow{Values: values})
			b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
		}
	}
}

// TestServerIsTooOld plays a server of another version.
func TestServerIsTooOld(t *testing.T) {
	t.Parallel()
	for version, words := range map[string]string{
		"130023": "PostgreSQL 13: the oldest that works is 14", "90624": "PostgreSQL 9", "": "oldest that works is 14",
		"150018": "overrides it", // a server that takes no idle_session_timeout
	} {
		addr := listen(t, answers("4711", "2026-11-21 12:00:00+00", "f", version, "0"))
		refused(t, "postgres://postgres:secret@"+addr+"/postgres?sslmode=disable", words)
	}
}

// TestServerIsStandby connects to a standby, alone and beside its primary.
func TestServerIsStandby(t *testing.T) {
	t.Parallel()
	primary := start(t)
	l := open(t, primary.URL)
	standby := standbyOf(t, primary)
	refused(t, standby.URL, "standby")
	both := "postgres://postgres@" + standby.Addr + "," + primary.Addr + "/postgres?sslmode=disable"
	finds := open(t, both)
	lease := acquire(t, finds, request("k"))
	if _, err := l.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("what was locked with both addresses: %v, want ErrHeld at the primary", err)
	}
	release(t, finds, lease)
}

// standbyOf starts a server that follows another.
func standbyOf(t testing.TB, primary *servertest.Server) *servertest.Server {
	t.Helper()
	standby, err := servertest.StartStandby(t.Context(), primary)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(); err != nil {
			t.Error(err)
		}
	})
	return standby
}

// TestConnectionsRunOut is about a server that has none left, at the opening and later.
func TestConnectionsRunOut(t *testing.T) {
	t.Parallel()
	server := start(t, "-c", "max_connections=5", "-c", "superuser_reserved_connections=0", "-c", "max_wal_senders=0")
	l := open(t, server.URL) // takes one
	others := []interface{ Close(context.Context) error }{direct(t, server.URL), direct(t, server.URL), direct(t, server.URL)}
	lease := acquire(t, l, request("k")) // takes the last
	refused(t, server.URL, "raise max_connections")
	_, err := l.Acquire(t.Context(), lasting(request("other"), 2*long)) // needs another session
	mustSay(t, err, "raise max_connections")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err = l.Acquire(ctx, request("k")) // waits, for which it needs one too
	if !errors.Is(err, locker.ErrHeld) {
		mustSay(t, err, "raise max_connections")
	}
	if _, err := l.Extend(t.Context(), lease); err != nil {
		t.Errorf("extending what is held: %v", err)
	}
	for _, other := range others {
		_ = other.Close(t.Context())
	}
	eventually(t, "connections are free again", func() bool {
		other, err := l.Acquire(t.Context(), lasting(try("other"), 2*long))
		return err == nil && l.Release(t.Context(), other) == nil
	})
	release(t, l, lease)
}

// TestServerGoesAway has the server reset the connection at each single message of a lock's life, before and after it has got it. Each call must
// end soon, and nothing may be left.
func TestServerGoesAway(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	observer := open(t, rawURL)
	for _, waits := range []bool{false, true} {
		for _, more := range []string{"", "&ddl=false&sequence=public.none"} {
			for _, delivered := range []bool{false, true} {
				for at := 1; ; at++ {
					if !goesAway(t, observer, rawURL+more, waits, at, delivered) {
						t.Logf("a life has %d messages", at-1)
						break
					}
					if at > 50 {
						t.Fatal("a life has no end")
					}
				}
			}
		}
	}
}

// goesAway lives a life, and resets the connection of the n-th message. It tells whether there was one. The lock is
// waited for, or free.
func goesAway(t *testing.T, observer locker.Locker, rawURL string, waits bool, n int, delivered bool) bool {
	t.Helper()
	var messages atomic.Int32
	errReset := errors.New("reset by the test")
	dial := dialTapped(func(c *tapped, p []byte) ([]byte, error) {
		if messages.Add(1) != int32(n) {
			return p, nil
		}
		if delivered {
			_, _ = c.Conn.Write(p)
		}
		_ = c.Conn.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
		return nil, errReset
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	began := time.Now()
	key := "k" + strconv.Itoa(n)
	if l, err := locker.OpenLocker(ctx, rawURL, locker.Config{Dial: dial}); err == nil {
		client, err := locker.New(l)
		if err != nil {
			t.Fatal(err)
		}
		released := make(chan error, 1)
		if waits {
			lease := acquire(t, observer, try(key))
			time.AfterFunc(30*time.Millisecond, func() { released <- observer.Release(ctx, lease) })
		} else {
			released <- nil
		}
		if lock, err := client.Acquire(ctx, key); err == nil {
			_ = lock.Extend(ctx)
			_ = lock.Release(ctx)
		}
		_ = client.Close()
		if err := <-released; err != nil {
			t.Error(err)
		}
		lease, err := observer.Acquire(t.Context(), try(key))
		if err != nil { // before the Locker is closed, which would hide it
			t.Errorf("reset at message %d, delivered %v, waits %v: the observer got %v", n, delivered, waits, err)
		} else {
			release(t, observer, lease)
		}
		_ = l.Close()
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("reset at message %d, delivered %v, waits %v: the life took %v", n, delivered, waits, took)
	}
	return messages.Load() >= int32(n)
}

// TestBadOptions are refused, and nothing is asked of a server.
func TestBadOptions(t *testing.T) {
	t.Parallel()
	config := settings(t, "postgres://postgres:secret@127.0.0.1:1/postgres")
	for words, opts := range map[string]pgbackend.Options{
		"use a short name": {Prefix: "a b"}, "more than 128 bytes": {Prefix: strings.Repeat("p", 129)},
		"-1 waiters": {Waiters: -1}, "1001 waiters": {Waiters: 1001},
		"schema.name": {Sequence: "a.b.c"}, `".x"`: {Sequence: ".x"},
	} {
		_, err := pgbackend.New(t.Context(), config, opts)
		mustSay(t, err, words)
	}
	_, err := pgbackend.New(t.Context(), nil, pgbackend.Options{})
	mustSay(t, err, "pgx.ParseConfig")
}
