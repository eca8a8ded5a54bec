package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

var (
	_ locker.Locker    = (*Redlock)(nil)
	_ locker.Inspector = (*Redlock)(nil)
	_ locker.Lister    = (*Redlock)(nil)
	_ locker.Breaker   = (*Redlock)(nil)
)

// DefaultQuarantine is how long a server that may have forgotten locks stays out of votes, unless RedlockOptions says otherwise.
const DefaultQuarantine = time.Minute

// RedlockOptions are the settings of a Redlock: the same for all clients of the same locks. The zero value is good.
type RedlockOptions struct {
	// Prefix is that of Options.
	Prefix string
	// Quarantine is how long a server stays out of votes after it was restarted, emptied or used for the first time, because
	// it may have forgotten votes that it gave before. Choose it longer than the TTL of every lock, by a tenth of it at least,
	// and longer than the servers' clocks differ. The default is DefaultQuarantine.
	Quarantine time.Duration
	// Durable says that each server has written down every change before it answers ("appendonly yes" and
	// "appendfsync always"): then one that comes back from a restart with its data needs no quarantine.
	Durable bool
}

// Redlock is a [locker.Locker] on 3, 5 or 7 independent Redis servers: a lock is held by whom most of them have given their
// vote. It works as long as most of them do, and no server needs to hear of another.
//
// All servers are asked at once, and what most of them have answered counts: nobody waits for a server that is down or
// hangs. Validity counts from before the first request was sent.
//
// # Tokens
//
// A client proposes a token together with its request: the time, by the median of the servers' clocks. A server accepts
// only tokens greater than all that it has accepted before, and otherwise votes with the next greater one. The
// token that most servers have accepted is the grant's; if there is none yet, the greatest is written back to the others first.
// So tokens of a lock grow strictly, whatever clients believe of the time.
//
// # Servers that forget
//
// A server that was restarted may have given its vote away and not know it any more. It stays out of votes until that vote
// must be over: for RedlockOptions.Quarantine, counted from its start, or from when it is first seen where its data is gone.
// That also means that servers which are used for the first time grant nothing for so long. A lock that most servers hold is told
// to the others by each Extend, so that a server which was down is of use again.
type Redlock struct {
	nodes      []*node
	quorum     int
	prefix     string
	channel    string
	marker     string
	quarantine int64 // in microseconds
	durable    bool
	last       atomic.Int64 // the latest token that was proposed
	opening    sync.WaitGroup
	closed     chan struct{}
	shut       func() error
}

// node is one of the servers.
type node struct {
	index    int
	addr     string
	client   *redis.Client
	pipeline *pipeline
	notices  *notices
	time     atomic.Pointer[serverTime]
	run      atomic.Pointer[string] // names the server's process
}

// serverTime is what a server's clock showed, in microseconds, shortly before that moment.
type serverTime struct {
	micros int64
	at     time.Time
}

// heard notes a server's time. It is never ahead of the server's own.
func (n *node) heard(micros int64) { n.time.Store(&serverTime{micros, time.Now()}) }

// NewRedlock makes a Redlock with the settings of these clients, one for each server. It opens connections of its own, which
// Close closes; the clients themselves remain the caller's, and are not used.
//
// NewRedlock asks the servers at once. It returns an error that says what to do if the servers' number is not 3, 5 or 7, if two
// are the same server, if one is no Redis, too old, a replica or wants a password, or if most cannot be reached. One that cannot
// be reached is used when it can be.
func NewRedlock(ctx context.Context, clients []*redis.Client, opts RedlockOptions) (*Redlock, error) {
	settings := make([]*redis.Options, len(clients))
	for i, client := range clients {
		if client == nil {
			return nil, redlockError("open", "", fmt.Errorf("client %d is nil: make one with redis.NewClient", i+1))
		}
		own := *client.Options()
		own.MaxRetries, own.ContextTimeoutEnabled = -1, true
		own.ReadTimeout, own.WriteTimeout = maxPatience, maxPatience
		own.PoolSize = max(own.PoolSize, 2)
		settings[i] = &own
	}
	r, err := newRedlock(ctx, settings, nil, opts)
	if err != nil {
		return nil, redlockError("open", "", err)
	}
	return r, nil
}

// redlockName is the backend's name in errors.
const redlockName = "redlock"

// newRedlock makes a Redlock of its own clients' settings. closeDials, if not nil, is called last by Close.
func newRedlock(ctx context.Context, settings []*redis.Options, closeDials func(), opts RedlockOptions) (*Redlock, error) {
	if opts.Prefix == "" {
		opts.Prefix = DefaultPrefix
	}
	if opts.Quarantine == 0 {
		opts.Quarantine = DefaultQuarantine
	}
	if err := checkPrefix(opts.Prefix); err != nil {
		return nil, err
	}
	if opts.Quarantine < time.Second {
		return nil, fmt.Errorf("a quarantine of %v is too short: give a second or more, and more than the longest TTL", opts.Quarantine)
	}
	if err := checkNodes(settings); err != nil {
		return nil, err
	}
	r := &Redlock{
		quorum:     len(settings)/2 + 1,
		prefix:     opts.Prefix,
		channel:    newChannel(opts.Prefix),
		marker:     opts.Prefix + "memory",
		quarantine: micros(opts.Quarantine),
		durable:    opts.Durable,
		closed:     make(chan struct{}),
	}
	for i, s := range settings {
		n := &node{index: i, addr: s.Addr}
		theirs := s.OnConnect
		s.OnConnect = func(ctx context.Context, conn *redis.Conn) error {
			if theirs != nil {
				if err := theirs(ctx, conn); err != nil {
					return err
				}
			}
			return r.connected(ctx, n, conn)
		}
		n.client = redis.NewClient(s)
		n.pipeline = newPipeline(n.client, true, max(1, min(maxBatches, s.PoolSize-1)), 0)
		n.pipeline.ordered = true
		n.notices = newNotices(n.client, r.channel)
		r.nodes = append(r.nodes, n)
	}
	r.shut = sync.OnceValue(func() error { return r.close(closeDials) })
	if err := r.check(ctx); err != nil {
		return nil, errors.Join(err, r.shut())
	}
	return r, nil
}

// checkNodes refuses numbers of servers that make no sense.
func checkNodes(settings []*redis.Options) error {
	n := len(settings)
	switch {
	case n == 1:
		return errors.New("one server has no majority to lose: write redis:// for it, or name 3, 5 or 7 servers")
	case n%2 == 0:
		return fmt.Errorf("%d servers tolerate no more failures than %d do: name 3, 5 or 7", n, max(n-1, 0))
	case n > 7:
		return fmt.Errorf("%d servers are asked for each lock, which makes it slow: name 3, 5 or 7", n)
	}
	seen := make(map[string]bool)
	for _, s := range settings {
		if seen[s.Addr] {
			return fmt.Errorf("the server %s is named twice: its vote would count twice", s.Addr)
		}
		seen[s.Addr] = true
	}
	return nil
}

// connected is called on each new connection, before anything else is sent on it.
func (r *Redlock) connected(ctx context.Context, n *node, conn *redis.Conn) error {
	reply, err := conn.Eval(ctx, redlockBirthScript.source, []string{r.marker}, r.birthArgs()...).Slice()
	if err != nil {
		return err
	}
	run := reply[0].(string)
	for _, other := range r.nodes {
		if theirs := other.run.Load(); other != n && theirs != nil && *theirs == run {
			return fmt.Errorf("%w: %s and %s", errSameServer, other.addr, n.addr)
		}
	}
	n.run.Store(&run)
	n.heard(reply[1].(int64))
	return nil
}

func (r *Redlock) birthArgs() []any {
	if r.durable {
		return []any{"keeps"}
	}
	return nil
}

var errSameServer = errors.New("two addresses lead to the same server, whose vote would count twice")

// check finds out early what would go wrong later. A minority may be out of reach.
func (r *Redlock) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	type result struct {
		node *node
		err  error
	}
	results := make(chan result, len(r.nodes))
	for _, n := range r.nodes {
		r.opening.Go(func() { results <- result{n, errors.Join(checkServer(ctx, n.client), n.warm(ctx))} })
	}
	var down []error
	var late <-chan time.Time
	for good := 0; good+len(down) < len(r.nodes); {
		select {
		case answer := <-results:
			switch {
			case answer.err == nil:
				good++
			case unreachable(answer.err):
				down = append(down, fmt.Errorf("%s: %w", answer.node.addr, answer.err))
			default:
				return fmt.Errorf("%s: %w", answer.node.addr, answer.err)
			}
			if good == r.quorum {
				timer := time.NewTimer(straggle)
				defer timer.Stop()
				late = timer.C
			}
		case <-late:
			return nil
		}
	}
	if len(down) > len(r.nodes)-r.quorum {
		return fmt.Errorf("%d of %d servers can be reached, and %d are needed: %w", len(r.nodes)-len(down), len(r.nodes), r.quorum, errors.Join(down...))
	}
	return nil
}

// warm makes a second connection. It takes three round trips until one is of use, and a call that finds the first one busy must
// not wait for so long.
func (n *node) warm(ctx context.Context) error {
	if n.client.Options().PoolSize < 2 {
		return nil
	}
	busy := n.client.Conn()
	defer busy.Close()
	if err := busy.Ping(ctx).Err(); err != nil {
		return err
	}
	return n.client.Ping(ctx).Err()
}

// unreachable tells errors of a server that is down from those of one that is the wrong one.
func unreachable(err error) bool {
	if errors.Is(err, errSameServer) {
		return false
	}
	return isNetwork(err) || strings.Contains(err.Error(), "did not answer") || strings.Contains(err.Error(), "LOADING")
}

// Capabilities implements [locker.Locker].
func (r *Redlock) Capabilities() locker.Capabilities {
	c := locker.Capabilities{
		Backend:     redlockName,
		MinTTL:      locker.MinTTL,
		Granularity: time.Microsecond,
		Expiry:      50 * time.Millisecond,
		Notifies:    true,
		Fallback:    maxPoll + 2*grace + 200*time.Millisecond,
		Fencing:     locker.FencingFailover,
		ReportsLoss: true,
		Labels:      true,
	}
	if !r.durable {
		c.EarlyFree = locker.EarlyFreeRestart // of most servers at once
	}
	return c
}

// Close implements [locker.Locker].
func (r *Redlock) Close() error { return r.shut() }

func (r *Redlock) close(closeDials func()) error {
	close(r.closed)
	var unsubscribed []<-chan struct{}
	for _, n := range r.nodes {
		unsubscribed = append(unsubscribed, n.notices.stop())
		n.pipeline.close()
	}
	// A subscription that ends by itself is not reported as a bad one in the log of go-redis.
	grace := time.NewTimer(50 * time.Millisecond)
	defer grace.Stop()
	for _, ended := range unsubscribed {
		select {
		case <-ended:
		case <-grace.C:
			grace.Reset(0)
		}
	}
	var errs []error
	for _, n := range r.nodes {
		errs = append(errs, n.client.Close()) // cuts short what is under way
	}
	if closeDials != nil {
		closeDials()
	}
	for i, n := range r.nodes {
		<-unsubscribed[i]
		n.pipeline.workers.Wait()
	}
	r.opening.Wait()
	return errors.Join(errs...)
}

// now is the time by the median of the servers' clocks, in microseconds, as far as this process has heard of them.
func (r *Redlock) now() int64 {
	times := make([]int64, 0, len(r.nodes))
	for _, n := range r.nodes {
		if t := n.time.Load(); t != nil {
			times = append(times, t.micros+time.Since(t.at).Microseconds())
		}
	}
	if len(times) == 0 {
		return 1
	}
	slices.Sort(times)
	return times[(len(times)-1)/2]
}

// propose makes a token, which also names an attempt: greater than all before.
func (r *Redlock) propose() int64 {
	for {
		last := r.last.Load()
		next := max(r.now(), last+1)
		if r.last.CompareAndSwap(last, next) {
			return next
		}
	}
}

// fail wraps an error of a call. ErrClosed stays as it is.
func (r *Redlock) fail(op, key string, err error) error { return redlockError(op, key, err) }

func redlockError(op, key string, err error) error {
	if errors.Is(err, locker.ErrClosed) || errors.Is(err, redis.ErrClosed) {
		return locker.ErrClosed
	}
	return &locker.Error{Op: op, Key: key, Backend: redlockName, Err: explain(err)}
}
