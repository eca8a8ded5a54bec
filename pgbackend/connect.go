package pgbackend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// role is what a session is for, as it stands in its application_name.
type role string

const (
	holding role = "hold"
	waiting role = "wait"
	control role = "control"
)

const (
	controlIdle = 10 * time.Minute // a control session holds nothing; so long a dead one is left
	setUp       = 5 * time.Second  // for the first statements of a session
)

// connect opens a session that the server ends when it has been idle for that long. The timer comes with the very first message,
// so that no session exists without it. While nothing is held it is no shorter than the set-up may take.
func (b *Backend) connect(ctx context.Context, r role, idle time.Duration) (s *session, err error) {
	for range 3 {
		if s, err = b.connectOnce(ctx, r, idle); !errors.Is(err, errOutOfStep) {
			break
		}
	}
	return s, err
}

// connectOnce fails with errOutOfStep where the first answer is that to another question, as PgBouncer's sometimes is.
func (b *Backend) connectOnce(ctx context.Context, r role, idle time.Duration) (*session, error) {
	label := fmt.Sprintf("locker %s %dms ", r, millis(idle))
	idle = max(idle, setUp)
	cfg := b.config.Copy()
	params := map[string]string{
		"idle_session_timeout":                strconv.FormatInt(millis(idle), 10),
		"idle_in_transaction_session_timeout": "0",
		"statement_timeout":                   "0",
		"lock_timeout":                        "0",
		"default_transaction_isolation":       "read committed",
		"plan_cache_mode":                     "force_generic_plan",
		"standard_conforming_strings":         "on",
		"client_encoding":                     "UTF8",
		"synchronous_commit":                  "on", // a token that comes from a transaction is on disk before it is used
	}
	label += cmp.Or(cfg.RuntimeParams["application_name"], b.label)
	maps.Copy(cfg.RuntimeParams, params)
	cfg.RuntimeParams["application_name"] = label[:min(len(label), 63)]

	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if refusedParameter(err) {
		// A pooler does not know them, nor does a PostgreSQL that is too old, which check tells. The session holds nothing
		// until they are set.
		for param := range params {
			delete(cfg.RuntimeParams, param)
		}
		conn, err = pgconn.ConnectConfig(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		return nil, err
	}
	s := &session{conn: hijacked.Conn, frontend: hijacked.Frontend, ended: make(chan struct{}), gone: make(chan struct{})}
	s.begin(&b.workers)
	ctx, cancel := context.WithTimeout(ctx, setUp)
	defer cancel()
	err = b.check(ctx, s, idle, hijacked.PID)
	if errors.Is(err, errOverridden) { // or dropped
		var set strings.Builder
		for param, value := range params {
			fmt.Fprintf(&set, "SET %s = '%s';", param, value)
		}
		if _, err = s.ask(ctx, set.String()); err == nil {
			err = b.check(ctx, s, idle, hijacked.PID)
		}
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func refusedParameter(err error) bool {
	var pgErr *pgconn.PgError
	const undefined = "42704"
	return errors.As(err, &pgErr) && (pgErr.Code == undefined || strings.Contains(pgErr.Message, "unsupported startup parameter"))
}

var errOverridden = errors.New("something between here and the server overrides it")

// check finds out early what would go wrong later.
func (b *Backend) check(ctx context.Context, s *session, idle time.Duration, handshake uint32) error {
	st, err := s.ask(ctx, "SELECT pid, backend_start, pg_is_in_recovery(), current_setting('server_version_num'), "+
		"(extract(epoch FROM current_setting('idle_session_timeout', true)::interval) * 1000)::int8 FROM pg_stat_get_activity(pg_backend_pid())")
	if err != nil {
		return err
	}
	if len(st.rows) == 0 {
		return errOutOfStep
	}
	row := st.rows[0]
	s.pid, s.started = row[0], row[1]
	version, _ := strconv.Atoi(row[3]) // 0 would be too old
	switch {
	case version < 140000:
		return fmt.Errorf("the server is PostgreSQL %d: the oldest that works is 14, which ends idle sessions by itself", version/10000)
	case row[2] == "t":
		return errors.New("the server is a standby: connect to its primary (with several hosts add target_session_attrs=read-write)")
	}
	if s.pid != strconv.FormatUint(uint64(handshake), 10) && !b.pooled.Load() {
		if err := b.checkPooler(ctx, s); err != nil {
			return err
		}
		b.pooled.Store(true)
	}
	if want := strconv.FormatInt(millis(idle), 10); row[4] != want {
		return fmt.Errorf("idle_session_timeout was set to %s ms by this session and is %s: %w", want, row[4], errOverridden)
	}
	return nil
}

const poolerCure = "a pooler moves statements between the server's sessions, and locks live in sessions: " +
	"connect to the server itself, or set pool_mode=session for this database (LockTx works behind every pooler)"

// checkPooler refuses a pooler that gives a server's session to another client while this one keeps its connection. Sooner or
// later the same server's session shows up on both sides.
func (b *Backend) checkPooler(ctx context.Context, s *session) error {
	other, err := pgconn.ConnectConfig(ctx, b.config.Copy())
	if err != nil {
		return err
	}
	defer func() { _ = other.Close(ctx) }()
	ask := func(sql string) (string, error) {
		results, err := other.Exec(ctx, sql).ReadAll()
		if err != nil || len(results) != 1 || len(results[0].Rows) != 1 {
			return "", err
		}
		return string(results[0].Rows[0][0]), nil
	}
	if _, err := ask("SELECT 1"); err != nil {
		return fmt.Errorf("the pooler gives no session (locks need one for each TTL, one for each waiter, and two more): %w", err)
	}
	for range 3 {
		if _, err := ask("BEGIN"); err != nil {
			return fmt.Errorf("%s: %w", poolerCure, err) // statement mode refuses transactions
		}
		// A pool of one session has none left for s now.
		if pid, err := ask("SELECT pg_backend_pid()"); err != nil || pid == s.pid {
			return errors.Join(errors.New(poolerCure), err)
		}
		if st, err := s.ask(ctx, "SELECT pg_backend_pid()"); err != nil || st.rows[0][0] != s.pid {
			return errors.Join(errors.New(poolerCure), err)
		}
		if _, err := ask("COMMIT"); err != nil {
			return err
		}
	}
	return nil
}

// millis rounds a time up to what the server counts in.
func millis(d time.Duration) int64 {
	return int64((d + time.Millisecond - 1) / time.Millisecond)
}
