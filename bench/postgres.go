package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fec20105/locker/internal/servertest"
	_ "github.com/fec20105/locker/pgbackend"
)

var postgresSystem = system{
	name: "postgres",
	start: func(ctx context.Context) (string, func() error, error) {
		s, err := servertest.StartPostgres(ctx, servertest.PostgresOptions{Args: []string{"-c", "max_locks_per_transaction=256"}})
		if err != nil {
			return "", nil, err
		}
		return s.URL, s.Stop, nil
	},
	watch: newPostgresMonitor,
	peers: []peer{
		{name: ours, open: openLocker},
		{name: "locker without a sequence", open: func(ctx context.Context, rawURL string, ttl time.Duration) (client, error) {
			return openLocker(ctx, rawURL+"&ddl=false&sequence=public.none", ttl)
		}},
		{name: "try + unlock", open: openAdvisory("SELECT pg_try_advisory_lock($1)"), floor: true, mute: true},
		{name: "pg_advisory_lock + unlock", open: openAdvisory("SELECT pg_advisory_lock($1)::text = ''"), mute: true},
	},
}

// advisory is what programs write by hand: a connection of a pool takes a lock and keeps it. There is neither a TTL nor a token.
type advisory struct {
	pool    *pgxpool.Pool
	take    string
	patient time.Duration
}

func openAdvisory(take string) func(context.Context, string, time.Duration) (client, error) {
	return func(ctx context.Context, rawURL string, ttl time.Duration) (client, error) {
		config, err := pgxpool.ParseConfig(rawURL)
		if err != nil {
			return nil, err
		}
		config.MaxConns = 64 // room for every goroutine of a contended scenario but the greatest
		pool, err := pgxpool.NewWithConfig(ctx, config)
		// A holder whose link is cut keeps its lock for ever.
		return &advisory{pool, take, 5 * ttl}, err
	}
}

func (c *advisory) lock(ctx context.Context, key string) (held, error) {
	hash := fnv.New64a()
	_, _ = hash.Write([]byte(key))
	id := int64(hash.Sum64())
	ctx, cancel := context.WithTimeout(ctx, c.patient)
	defer cancel()
	soon, enough := context.WithTimeout(ctx, time.Second) // 64 locks use up the pool
	conn, err := c.pool.Acquire(soon)
	enough()
	if err != nil {
		return held{}, fmt.Errorf("a connection of the pool: %w", err)
	}
	got := false
	if err := conn.QueryRow(ctx, c.take, id).Scan(&got); err != nil || !got {
		conn.Release()
		return held{}, errors.Join(err, errors.New("held"))
	}
	return held{unlock: func() error {
		defer conn.Release()
		var done bool
		err := conn.QueryRow(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", id).Scan(&done)
		if err == nil && !done {
			err = errors.New("unlock: not done")
		}
		return err
	}}, nil
}

func (c *advisory) close() error {
	closed := make(chan struct{})
	go func() { // waits for connections that are cut
		defer close(closed)
		c.pool.Close()
	}()
	select {
	case <-closed:
		return nil
	case <-time.After(time.Second):
		return errors.New("the pool does not close")
	}
}

type postgresMonitor struct{ conn *pgx.Conn }

func newPostgresMonitor(ctx context.Context, rawURL string) (monitor, error) {
	conn, err := pgx.Connect(ctx, rawURL)
	return &postgresMonitor{conn}, err
}

func (m *postgresMonitor) close() error { return m.conn.Close(context.Background()) }

func (m *postgresMonitor) connections(ctx context.Context) (n int, err error) {
	err = m.conn.QueryRow(ctx, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'").Scan(&n)
	return n, err
}

// commands counts transactions: no peer puts two statements into one. A server's process tells of its own once a second while it is
// busy, so a short span is counted badly.
func (m *postgresMonitor) commands(ctx context.Context, span time.Duration) (n int64, err error) {
	const count = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
	var before, after int64
	if err := m.conn.QueryRow(ctx, count).Scan(&before); err != nil {
		return 0, err
	}
	settle(ctx, span)
	if err := m.conn.QueryRow(ctx, count).Scan(&after); err != nil {
		return 0, fmt.Errorf("count transactions: %w", err)
	}
	return max(after-before-1, 0), nil
}
