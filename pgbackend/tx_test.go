package pgbackend_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/pgbackend"
)

func begin(t testing.TB, conn *pgx.Conn) pgx.Tx {
	t.Helper()
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return tx
}

// TestLockTx takes locks in transactions of the program's own. They exclude each other and those of a Backend.
func TestLockTx(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	l := open(t, rawURL)
	one, two := direct(t, rawURL), direct(t, rawURL)

	tx := begin(t, one)
	if err := l.LockTx(t.Context(), tx, "k"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("acquire of what a transaction has locked: %v, want ErrHeld", err)
	}
	if _, err := l.Inspect(t.Context(), "k"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("inspect of what a transaction has locked: %v, want ErrUnsupported", err)
	}
	if _, ok, err := l.InspectSession(t.Context(), "k"); err != nil || !ok {
		t.Errorf("the session of what a transaction has locked: %v, %v", ok, err)
	}
	waiting := wait(t.Context(), l, request("k"))
	other := begin(t, two)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := l.LockTx(ctx, other, "k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a transaction waits for another's lock: %v, want DeadlineExceeded", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	lease := granted(t, waiting)

	tx = begin(t, one)
	locked := make(chan error, 1)
	go func() { locked <- l.LockTx(t.Context(), tx, "k") }()
	select {
	case err := <-locked:
		t.Fatalf("a transaction has locked what a lease holds: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	release(t, l, lease)
	if err := <-locked; err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	release(t, l, acquire(t, l, try("k")))
}

// TestLockTxPrefix is about the name of a lock that LockTx and programs in other languages take.
func TestLockTxPrefix(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	l, err := pgbackend.New(t.Context(), settings(t, exampleURL), pgbackend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn := direct(t, rawURL)
	tx := begin(t, conn)
	if err := pgbackend.LockTx(t.Context(), tx, "tx prefix"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Acquire(t.Context(), try("tx prefix")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("acquire of what a transaction has locked: %v, want ErrHeld", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The documented name: the first 64 bits of a SHA-256.
	const byHand = "SELECT pg_advisory_lock(('x' || encode(substr(sha256(convert_to('locker:', 'UTF8') || '\\x00'::bytea || " +
		"convert_to('tx prefix', 'UTF8')), 1, 8), 'hex'))::bit(64)::int8)::text"
	ask(t, conn, byHand)
	if _, err := l.Acquire(t.Context(), try("tx prefix")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("acquire of what SQL has locked by hand: %v, want ErrHeld", err)
	}
	ask(t, conn, "SELECT pg_advisory_unlock_all()::text")
	release(t, l, acquire(t, l, try("tx prefix")))

	tx = begin(t, conn)
	mustSay(t, pgbackend.LockTx(t.Context(), tx, ""), "empty")
	mustSay(t, pgbackend.LockTx(t.Context(), tx, strings.Repeat("k", locker.MaxKeyLength+1)), "512")
	if _, err := tx.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Errorf("a bad key has hurt the transaction: %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestGuard writes with tokens in the order in which late writers come.
func TestGuard(t *testing.T) {
	t.Parallel()
	server := start(t)
	conn := direct(t, server.URL)
	tx := begin(t, conn)
	mustSay(t, pgbackend.Guard(t.Context(), tx, "k", 1), "GuardTable")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), pgbackend.GuardTable); err != nil {
		t.Fatal(err)
	}
	const top = 1 << 53
	for _, step := range []struct {
		key   string
		token uint64
		keep  bool
		want  error
	}{
		{"k", 10, true, nil},
		{"k", 10, true, nil},
		{"k", 9, true, locker.ErrStaleToken},
		{"other", 5, true, nil},
		{"k", 20, false, nil},
		{"k", 11, true, nil}, // what is rolled back was not seen
		{"k", top, true, nil},
		{"k", top - 1, true, locker.ErrStaleToken},
	} {
		tx := begin(t, conn)
		if err := pgbackend.Guard(t.Context(), tx, step.key, step.token); !errors.Is(err, step.want) || err != nil && step.want == nil {
			t.Errorf("%s with token %d: %v, want %v", step.key, step.token, err, step.want)
		}
		end := tx.Rollback
		if step.keep {
			end = tx.Commit
		}
		if err := end(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	tx = begin(t, conn)
	mustSay(t, pgbackend.Guard(t.Context(), tx, "k", 0), "token 0")
	mustSay(t, pgbackend.Guard(t.Context(), tx, "k", top+1), "give that of a held lock")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestGuardExcludes lets writers with different tokens meet: whoever comes second waits, and is refused if its token is the older.
func TestGuardExcludes(t *testing.T) {
	t.Parallel()
	server := start(t)
	setUp := direct(t, server.URL)
	if _, err := setUp.Exec(t.Context(), pgbackend.GuardTable+"; CREATE TABLE account (n bigserial, token int8)"); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for i := range 8 {
		conn := direct(t, server.URL)
		writers.Go(func() {
			for n := range 25 {
				token := uint64(1 + (n*8+i*37)%200) // in another order each
				tx, err := conn.Begin(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if err = pgbackend.Guard(t.Context(), tx, "account", token); err == nil {
					if _, err = tx.Exec(t.Context(), "INSERT INTO account (token) VALUES ($1)", int64(token)); err == nil {
						err = tx.Commit(t.Context())
					}
				}
				if errors.Is(err, locker.ErrStaleToken) {
					err = tx.Rollback(t.Context())
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	rows := ask(t, setUp, "SELECT token::text FROM account ORDER BY n")
	for i := range rows[1:] {
		if number(t, rows[i+1]) < number(t, rows[i]) {
			t.Fatalf("a write with token %s followed one with %s", rows[i+1], rows[i])
		}
	}
	if last := number(t, rows[len(rows)-1]); last != 200 {
		t.Errorf("the last write has token %d, want 200", last)
	}
}
