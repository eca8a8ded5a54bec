package pgbackend_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/pgbackend"
)

// A program that has settings already gives them to New, which makes connections of its own: those of a pool are
// pool.Config().ConnConfig. Programs that have none can say locker.Open(ctx, "postgres://user:password@host/database") instead.
func ExampleNew() {
	ctx := context.Background()
	config, err := pgx.ParseConfig(exampleURL)
	if err != nil {
		fmt.Println(err)
		return
	}

	backend, err := pgbackend.New(ctx, config, pgbackend.Options{Prefix: "myapp:"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer backend.Close()
	client, err := locker.New(backend)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	err = client.Do(ctx, "invoice/42", func(ctx context.Context, lock *locker.Lock) error {
		fmt.Println("holding", lock.Key())
		return ctx.Err()
	})
	fmt.Println("error:", err)
	// Output:
	// holding invoice/42
	// error: <nil>
}

// What is done in one transaction needs no lease: the lock ends with it. This works behind every pooler.
func ExampleLockTx() {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, exampleURL)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close(ctx)

	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if err := pgbackend.LockTx(ctx, tx, "migrations"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "CREATE TABLE IF NOT EXISTS accounts (id int PRIMARY KEY, balance int)")
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

// A writer that lost its lock without noticing is refused by the database itself.
func ExampleGuard() {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, exampleURL)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, pgbackend.GuardTable+"; CREATE TABLE IF NOT EXISTS balances (id int PRIMARY KEY, cents int)"); err != nil {
		fmt.Println(err)
		return
	}

	write := func(token uint64, cents int) error { // in the work, with lock.Token()
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if err := pgbackend.Guard(ctx, tx, "balance/42", token); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, "INSERT INTO balances VALUES (42, $1) ON CONFLICT (id) DO UPDATE SET cents = excluded.cents", cents)
			return err
		})
	}
	const slow, fast = 1000, 1001 // the tokens of two locks, one after the other
	fmt.Println(write(slow, 90))
	fmt.Println(write(fast, 75))
	fmt.Println(errors.Is(write(slow, 80), locker.ErrStaleToken))

	var cents int
	err = conn.QueryRow(ctx, "SELECT cents FROM balances WHERE id = 42").Scan(&cents)
	fmt.Println(cents, err)
	// Output:
	// <nil>
	// <nil>
	// true
	// 75 <nil>
}

// PostgreSQL knows the session that holds a lock, so that is what an administrator sees. Name programs with application_name.
func ExampleBackend_InspectSession() {
	ctx := context.Background()
	l, err := locker.OpenLocker(ctx, exampleURL+"&prefix=inspected:&application_name=reports", locker.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	client, err := locker.New(l)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	lock, err := client.Acquire(ctx, "report")
	if err != nil {
		fmt.Println(err)
		return
	}

	session, held, err := l.(*pgbackend.Backend).InspectSession(ctx, lock.Key())
	fmt.Println(session.Label, held, err)
	// Output: locker hold 15000ms reports true <nil>
}

// An administrator finds a lock in pg_locks by its number.
func ExampleLockID() {
	id := uint64(pgbackend.LockID(pgbackend.DefaultPrefix, "invoice/42"))
	fmt.Printf("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND classid = %d AND objid = %d\n", id>>32, uint32(id))
	// Output: SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND classid = 4174540162 AND objid = 1497258052
}
