package pgbackend

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/fec20105/locker"
)

// LockTx takes the lock of a key for the rest of a transaction of the program's own, which ends it in every way in which it can
// end. It waits as long as ctx does; when ctx ends pgx ends the transaction's connection. Such a lock and one of a [Backend]
// with the DefaultPrefix exclude each other. It has no TTL and no token: the transaction is both. It works behind every pooler.
func LockTx(ctx context.Context, tx pgx.Tx, key string) error {
	return lockTx(ctx, tx, DefaultPrefix, key)
}

// LockTx is the function [LockTx] for the prefix of this Backend.
func (b *Backend) LockTx(ctx context.Context, tx pgx.Tx, key string) error {
	return lockTx(ctx, tx, b.opts.Prefix, key)
}

func lockTx(ctx context.Context, tx pgx.Tx, prefix, key string) error {
	probe := locker.Request{Key: key, ID: "tx", TTL: locker.MinTTL}
	err := probe.Validate()
	if err == nil {
		_, err = tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", LockID(prefix, key))
	}
	if err != nil {
		return &locker.Error{Op: "acquire", Key: key, Backend: name, Err: explain(err)}
	}
	return nil
}

// GuardTable is the SQL of the table in which [Guard] keeps the newest token of each key. A program creates it where it keeps
// what the locks protect.
const GuardTable = `CREATE TABLE IF NOT EXISTS locker_guards (
	key   text PRIMARY KEY,
	token bigint NOT NULL
)`

// Guard lets the database itself refuse a writer whose lock was lost. Called in the transaction that writes, with the token of the lock
// that protects what is written, it answers [locker.ErrStaleToken] if a greater token has been seen for this key: roll the
// transaction back then. Otherwise it remembers the token with the transaction's commit, and makes others with this key wait for
// that. It needs the table [GuardTable].
func Guard(ctx context.Context, tx pgx.Tx, key string, token uint64) error {
	fail := func(err error) error {
		return &locker.Error{Op: "guard", Key: key, Backend: name, Err: explain(err)}
	}
	const most = 1 << 53
	if token == 0 || token > most {
		return fail(fmt.Errorf("the token %d is none: give that of a held lock", token))
	}
	tag, err := tx.Exec(ctx, "INSERT INTO locker_guards AS g VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET token = excluded.token "+
		"WHERE g.token <= excluded.token", key, int64(token))
	const undefinedTable = "42P01"
	switch {
	case codeOf(err) == undefinedTable:
		return fail(errors.Join(errors.New("the table locker_guards does not exist: create it with GuardTable"), err))
	case err != nil:
		return fail(err)
	case tag.RowsAffected() == 0:
		return fmt.Errorf("%w: %q was written with a greater token than %d", locker.ErrStaleToken, key, token)
	}
	return nil
}
