// Package pgbackend keeps locks on a PostgreSQL server, version 14 or later, as session advisory locks with a time to live.
//
// Importing it registers the URL schemes postgres and postgresql with [locker.Open]; [New] takes the settings of a program
// that connects by itself.
//
// # What is promised
//
// Advisory locks end with their session. So the server's own idle_session_timeout is the TTL: it ends a session whose client
// has been silent for that long, be it dead, stopped or cut off, and with it the session's locks. A heartbeat is one short
// statement, which starts that timer again. The other side of it: a session that ends takes its locks along at once, on a
// broken connection, pg_terminate_backend, a restart or a failover ([locker.EarlyFreeDisconnect] and the others). The holder
// is told at once on a live link, and by its deadline otherwise; until then only the token protects.
//
// Locks with one TTL share a session, however many they are. Each still ends at its own TTL, because this package frees it
// then. If the client dies, and nobody tells the server, the server ends them all together, one TTL after the last sign of
// life. Locks that are not extended ([locker.Request].NoExtend) have sessions of their own, on which nothing is heard.
//
// A token comes from a sequence, which New creates. A session that cannot know that another has done so since the server
// started first commits a jump of that sequence, to the server's time in microseconds at least. So tokens grow also over a crash
// that forgets the last values, and over the loss of all data as long as the server's clock is not set back. Where the
// sequence may not be created, or with Options.WithoutDDL, the token is the number of a transaction written to the log: that
// costs a write to disk for each lock, and survives no loss of data. An administrator creates the sequence with
//
//	CREATE SEQUENCE public.locker_tokens MAXVALUE 9007199254740991;
//	GRANT USAGE, SELECT, UPDATE ON SEQUENCE public.locker_tokens TO app;
//
// All programs that share locks must take their tokens from the same place.
//
// # Connections
//
// There is one session for each TTL in use, one to manage them, and, while requests wait, at most Options.Waiters that wait. They
// come from no pool, and never go to one. A waiter asks in slices of half a second, so that it does not hold up
// CREATE INDEX CONCURRENTLY for longer. Where more keys are waited for than there are waiters, they take turns. Goroutines of one
// process pass a lock on to each other, which costs one statement, for a turn of a few milliseconds.
//
// A pooler must keep a client on its session: PgBouncer with pool_mode=session. Another one is refused. [LockTx] works behind
// all of them.
//
// # What is on the server
//
// Advisory locks belong to a database: clients in different databases do not meet. See [LockID] for their names, and docs/postgres.md for what else administrators may want to know. A held lock
// takes two places in the server's lock table, which has room for about max_connections times max_locks_per_transaction.
package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/clock"
)

var (
	_ locker.Locker    = (*Backend)(nil)
	_ locker.Inspector = (*Backend)(nil)
	_ locker.Breaker   = (*Backend)(nil)
)

// Defaults of Options.
const (
	DefaultPrefix   = "locker:"
	DefaultWaiters  = 4
	DefaultSequence = "public.locker_tokens"
)

const (
	minTTL = 200 * time.Millisecond // a new session must not end before its first lock is asked for
	// remembered is how long a finished request's ID is known, so that a repeated Release is answered like the first.
	remembered = 15 * time.Second
)

// Options are the settings of a Backend. The zero value is good.
type Options struct {
	// Prefix is hashed into the name of every lock: programs with different prefixes do not meet. The default is DefaultPrefix.
	Prefix string
	// Waiters is the most sessions that wait for locks which are held. The default is DefaultWaiters.
	Waiters int
	// Sequence is the name of the sequence from which tokens come, with its schema. The default is DefaultSequence.
	Sequence string
	// WithoutDDL forbids to create the sequence.
	WithoutDDL bool
	// Logger gets what no call can return. The default discards it.
	Logger *slog.Logger
}

// Backend is a [locker.Locker] on a PostgreSQL server.
type Backend struct {
	config  *pgconn.Config
	opts    Options
	label   string // of sessions, unless the settings have one
	tokens  atomic.Pointer[tokens]
	fencing locker.Fencing
	clock   clock.Clock

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	workers sync.WaitGroup // every goroutine
	shut    func()

	control controlSession
	waiters waiters

	mu       sync.Mutex // of everything below, and of grants and holders
	closed   bool
	requests map[string]*grant // by ID, until nothing is left of them at the server
	keys     map[string]*entry
	holders  map[timer][]*holder
	opening  map[timer]*opening
	sessions map[*session]struct{}
	finished map[string]struct{} // IDs that were released or withdrawn
	forget   []finished          // the same, oldest first
	pooled   atomic.Bool         // a pooler stands in between
}

type finished struct {
	id string
	at time.Time
}

// name is the backend's name in errors.
const name = "postgres"

// New makes a Backend that connects with these settings, which may come from [pgx.ParseConfig] or from a pool
// (pool.Config().ConnConfig). It makes connections of its own, and leaves those of the program alone.
//
// New asks the server at once, and returns an error that says what to do if it is too old, is a standby, refuses the
// user, or stands behind a pooler that moves sessions.
func New(ctx context.Context, config *pgx.ConnConfig, opts Options) (*Backend, error) {
	if config == nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: errors.New("the settings are nil: make them with pgx.ParseConfig")}
	}
	return newBackend(ctx, &config.Config, opts)
}

func newBackend(ctx context.Context, config *pgconn.Config, opts Options) (*Backend, error) {
	fail := func(err error) (*Backend, error) {
		return nil, &locker.Error{Op: "open", Backend: name, Err: explain(err)}
	}
	if opts.Prefix == "" {
		opts.Prefix = DefaultPrefix
	}
	if opts.Waiters == 0 {
		opts.Waiters = DefaultWaiters
	}
	if opts.Sequence == "" {
		opts.Sequence = DefaultSequence
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if err := checkOptions(opts); err != nil {
		return fail(err)
	}
	b := &Backend{
		config: config.Copy(), opts: opts, label: processLabel(), clock: clock.System(),
		requests: make(map[string]*grant), keys: make(map[string]*entry), finished: make(map[string]struct{}),
		holders: make(map[timer][]*holder), opening: make(map[timer]*opening), sessions: make(map[*session]struct{}),
	}
	if b.config.ConnectTimeout == 0 {
		b.config.ConnectTimeout = defaultConnectTimeout
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.shut = sync.OnceFunc(b.shutdown)
	if err := b.prepareTokens(ctx); err != nil {
		b.shut()
		return fail(err)
	}
	if b.fencing = locker.FencingCrash; b.tokens.Load().transactions {
		b.fencing = locker.FencingRestart // and over a crash that loses no data
	}
	return b, nil
}

// defaultConnectTimeout bounds the making of a connection.
const defaultConnectTimeout = 5 * time.Second

func checkOptions(opts Options) error {
	bad := func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }
	if len(opts.Prefix) > 128 || strings.ContainsFunc(opts.Prefix, bad) {
		return fmt.Errorf("the prefix %q has spaces or more than 128 bytes: use a short name such as %q", opts.Prefix, DefaultPrefix)
	}
	if opts.Waiters < 1 || opts.Waiters > 1000 {
		return fmt.Errorf("%d waiters are not possible: give 1 to 1000, and 0 for the default", opts.Waiters)
	}
	if _, err := quoteName(opts.Sequence); err != nil {
		return err
	}
	return nil
}

// processLabel names this process for people.
func processLabel() string {
	host, err := os.Hostname()
	if err != nil {
		host = "?"
	}
	label := fmt.Sprintf("%s %s/%d", filepath.Base(os.Args[0]), host, os.Getpid())
	return strings.Map(func(r rune) rune { // the server would put two question marks for each other letter
		if r < ' ' || r > '~' {
			return '_'
		}
		return r
	}, label)
}

// Capabilities implements [locker.Locker].
func (b *Backend) Capabilities() locker.Capabilities {
	return locker.Capabilities{
		Backend:     name,
		MinTTL:      minTTL,
		Granularity: time.Millisecond,
		Expiry:      150 * time.Millisecond, // the server's timer, the end of its process and a waiter's round trip
		EarlyFree:   locker.EarlyFreeDisconnect | locker.EarlyFreeRestart | locker.EarlyFreeFailover,
		Notifies:    true,
		Fallback:    fallback,
		Fencing:     b.fencing,
		ReportsLoss: true,
	}
}

// Close implements [locker.Locker]. The sessions end, and with them all locks that are held.
func (b *Backend) Close() error {
	b.shut()
	return nil
}

func (b *Backend) shutdown() {
	b.mu.Lock()
	b.closed = true
	var told []func(locker.Reason)
	for _, g := range b.requests {
		if g.state == held && g.req.Lost != nil {
			told = append(told, g.req.Lost)
			g.req.Lost = nil
		}
	}
	sessions := make([]*session, 0, len(b.sessions))
	for s := range b.sessions {
		sessions = append(sessions, s)
	}
	for _, hs := range b.holders {
		for _, h := range hs {
			h.stop()
		}
	}
	b.mu.Unlock()
	for _, lost := range told {
		lost(locker.ReasonClosed)
	}
	b.cancel()
	var closing sync.WaitGroup
	for _, s := range sessions {
		closing.Go(s.close)
	}
	closing.Wait()
	b.workers.Wait()
}

// adopt notes a session that Close has to close. It answers false, and closes it, if Close has begun.
func (b *Backend) adopt(s *session) bool {
	b.mu.Lock()
	closed := b.closed
	if !closed {
		b.sessions[s] = struct{}{}
	}
	b.mu.Unlock()
	if closed {
		s.close()
	}
	return !closed
}

// ready says why a call cannot be made.
func (b *Backend) ready(ctx context.Context) error {
	if b.ctx.Err() != nil {
		return locker.ErrClosed
	}
	return ctx.Err()
}

// fail wraps an error of a call. ErrClosed stays as it is.
func (b *Backend) fail(op, key string, err error) error {
	if b.ctx.Err() != nil || errors.Is(err, locker.ErrClosed) {
		return locker.ErrClosed
	}
	return &locker.Error{Op: op, Key: key, Backend: name, Err: explain(err)}
}

// spawn starts a goroutine that Close waits for, unless Close has begun.
func (b *Backend) spawn(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spawnLocked(f)
}

func (b *Backend) spawnLocked(f func()) {
	if !b.closed {
		b.workers.Go(f)
	}
}
