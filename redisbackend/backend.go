// Package redisbackend keeps locks on Redis or Valkey, version 6.2 or later: on one server, on the primary that Sentinels watch, in
// a cluster, or on several independent servers ([Redlock]).
//
// Importing it registers URL schemes with [locker.Open], each also for TLS and one for a socket:
//
//	redis://user:password@host:6379/0                       rediss://  redis+unix://
//	redis+sentinel://user:password@s1:26379,s2,s3/NAME/0    rediss+sentinel://
//	redis+cluster://user:password@h1:6379,h2,h3             rediss+cluster://
//	redlock://user:password@h1:6379,h2,h3/0                 redlocks://
//
// [New] and [NewRedlock] take clients that the program already has: New those of go-redis for one server, for Sentinels and
// for a cluster.
//
// # What is promised
//
// Each step is one script on the server, so that a lock is granted, extended or freed as a whole or not at all. Those
// who wait are served in the order in which they came, and are woken when their turn comes; a lost message delays them
// by a few seconds at most. A lock that an operator takes away ([Backend.Break]) is reported at once.
//
// A token is the server's time in microseconds, or the last token plus one if that is greater. So tokens grow even if
// the server is restarted without its data, as long as its clock is not set back meanwhile. They also grow over a
// failover if the clocks of the servers differ by less than the failover takes.
//
// A server that restarts without persistence, or with the data of a moment ago, and a replica that is promoted before
// it had everything, forget locks: somebody else can then be granted a lock that is still held. The holder learns of it
// at its next heartbeat, and only the token protects until then ([locker.EarlyFreeRestart], [locker.EarlyFreeFailover]).
//
// # Sentinel and Cluster
//
// Options.Replicas decides what a failover may cost. If as many are demanded as a primary has, whoever takes over knows each lock that is
// held, until when it was extended last; and a holder which still reaches the old primary, when that is cut off from the others, is no
// longer renewed. So the work is told before anybody else is granted the lock, if the clocks of the servers differ by less than
// the margin that is kept (1 % of the TTL). But nothing is granted and nothing extended while one of these replicas is down. With fewer,
// the replica that takes over may be one that has not confirmed. Without any, a failover may forget what was granted just before,
// and a primary that is cut off from Sentinels and replicas goes on extending for those who still reach it, and reach no Sentinel, until the
// partition ends: set min-replicas-to-write there. A primary of a cluster stops by itself after cluster-node-timeout.
//
// A wait outlasts a failover, for a minute at most; calls wait for it as long as their ctx lets them, 5 s without a deadline.
// Locks stay held if the failover takes less than what is left of their TTL: choose one of twice the time at least that Sentinels
// (down-after-milliseconds, 30 s by default) or the cluster (cluster-node-timeout, 15 s by default) need to notice, and some seconds.
// In a cluster a lock is in one slot. That slots are being moved costs a call a moment, and while half of the keys of its slot are on
// either server a waiter may be overtaken.
//
// # What is on the server
//
// All keys of the lock "invoice/42" begin with locker:{invoice/42}, and all of them expire: the lock's state, which also
// keeps its last token, one to two days after its last lease; what remembers a released request after 15 seconds; the
// queue 14 seconds after the last poll. In a cluster they stand in one slot; scripts are told the first key only.
//
// A user with limited rights needs those keys, the channels locker:*, and the commands EVAL, EVALSHA, SUBSCRIBE, PUBLISH,
// PING, INFO, TIME, GET, MGET, SET, SETRANGE, PEXPIRE and those of sorted sets; for listing also SCAN, with replicas
// also WAIT, in a cluster also ASKING, CLUSTER INFO and CLUSTER SLOTS; at a Sentinel SENTINEL GET-MASTER-ADDR-BY-NAME, SENTINEL MASTER and
// SUBSCRIBE. Redlock keeps one more key on each server, locker:memory, which does not expire: without it the server counts
// as one that has forgotten all.
package redisbackend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

var (
	_ locker.Locker    = (*Backend)(nil)
	_ locker.Inspector = (*Backend)(nil)
	_ locker.Lister    = (*Backend)(nil)
	_ locker.Breaker   = (*Backend)(nil)
)

// DefaultPrefix begins all keys and channels unless Options says otherwise.
const DefaultPrefix = "locker:"

const (
	// tombstoneLife is how long a released or withdrawn request is remembered. Client libraries that retry by themselves
	// have given up by then.
	tombstoneLife = 15 * time.Second
	// patience is how long a waiter may be silent before it counts as dead.
	patience = 3500 * time.Millisecond
	// grace is how long a lock is kept free for the first waiter, who was woken, before the next one gets it.
	grace = 300 * time.Millisecond
	// failoverTime is how long a wait goes on without an answer where another server takes over from one that has failed. By
	// default Sentinels take half a minute to notice.
	failoverTime = time.Minute
	// maxPoll is the longest that a live waiter is silent: it leaves time for a slow poll and one repetition.
	maxPoll = 1500 * time.Millisecond
)

// Options are the settings of a Backend. The zero value is good.
type Options struct {
	// Prefix begins the name of every key and channel: programs with different prefixes do not meet. The default is
	// DefaultPrefix. It may not contain spaces or braces.
	Prefix string
	// Replicas is how many replicas must confirm every grant and every extension before it counts. With all that a primary
	// has, the loss of a lock by a failover is told first; see "Sentinel and Cluster". What is not confirmed within a second is an
	// error, and the lock ends at its deadline if that goes on.
	Replicas int
}

// Backend is a [locker.Locker] on one Redis server, a primary that Sentinels watch, or a cluster.
type Backend struct {
	prefix   string
	channel  string // where notices are published for this Backend
	replicas int    // that must confirm
	own      bool   // the connections are ours, and nothing is repeated on them without our knowledge

	calls   carrier
	notices *notices
	servers func(context.Context) ([]redis.Cmdable, error) // that together have all keys
	settled settled
	relay   relay
	outage  time.Duration // for which a wait goes on without an answer
	copies  int           // replicas of a server; 0 if that is not known
	closed  chan struct{} // ends waits
	shut    func() error  // does what Close does, once
}

// New makes a Backend on a client that remains the caller's: Close does not close it. It may have any settings; retries
// do no harm, because every request is recognised when it comes again. Its pool needs room for two connections.
// A client of redis.NewFailoverClient is one for a single server. Of a [redis.ClusterClient] the settings are taken, for connections
// of the Backend's own, on which hooks are called only if ClusterOptions.NewClient adds them.
//
// New asks the server at once, and returns an error that says what to do if that is no Redis, is too old, is a
// read-only replica or wants a password.
func New(ctx context.Context, client redis.UniversalClient, opts Options) (*Backend, error) {
	b, err := newBackend(ctx, client, nil, opts)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	return b, nil
}

// name is the backend's name in errors.
const name = "redis"

// newBackend makes a Backend. If the client is our own, closeClient closes it.
func newBackend(ctx context.Context, client redis.UniversalClient, closeClient func() error, opts Options) (*Backend, error) {
	if isNil(client) {
		return nil, errors.New("the client is nil: make one with redis.NewClient")
	}
	b, err := prepare(opts)
	if err != nil {
		return nil, err
	}
	pool := 2 // at least, in clients that are unknown here
	single := false
	switch client := client.(type) {
	case *redis.Client:
		single, pool = true, client.Options().PoolSize
		if client.Options().Addr == "FailoverClient" { // as go-redis calls all of those
			b.outage = failoverTime
		}
	case *redis.ClusterClient:
		return newClusterBackend(ctx, clusterOf(client, opts.Replicas), opts, nil)
	case *redis.Ring:
		return nil, errors.New("a *redis.Ring moves keys to other servers, and with them locks: give a *redis.Client or *redis.ClusterClient")
	}
	if opts.Replicas > 0 && !single {
		return nil, fmt.Errorf("%d replicas cannot be demanded of a %T, which does not tell its servers: give a *redis.Client or *redis.ClusterClient", opts.Replicas, client)
	}
	if err := checkServer(ctx, client); err != nil {
		return nil, err
	}
	if err := checkChannels(ctx, client, b.prefix); err != nil {
		return nil, err
	}
	b.servers = func(context.Context) ([]redis.Cmdable, error) { return []redis.Cmdable{client}, nil }
	p := newPipeline(client, closeClient != nil, max(1, min(maxBatches, pool-1)), opts.Replicas)
	b.start(p, client, closeClient)
	b.own = p.own
	return b, nil
}

// prepare makes a Backend without servers.
func prepare(opts Options) (*Backend, error) {
	if opts.Prefix == "" {
		opts.Prefix = DefaultPrefix
	}
	if err := checkPrefix(opts.Prefix); err != nil {
		return nil, err
	}
	if opts.Replicas < 0 {
		return nil, fmt.Errorf("%d replicas cannot be demanded: give 0 or more", opts.Replicas)
	}
	b := &Backend{prefix: opts.Prefix, channel: newChannel(opts.Prefix), replicas: opts.Replicas, closed: make(chan struct{}), outage: patience}
	b.settled = newSettled()
	b.relay.seed = maphash.MakeSeed()
	return b, nil
}

// start gives a Backend its servers: who carries calls to them, and where it listens. closeClient, if not nil, closes the
// connections.
func (b *Backend) start(calls carrier, listensAt subscriber, closeClient func() error) {
	b.calls, b.own = calls, true
	b.notices = newNotices(listensAt, b.channel)
	b.notices.lostOf = b.lostOf
	b.shut = sync.OnceValue(func() (err error) {
		close(b.closed)
		unsubscribed := b.notices.stop()
		b.calls.close()
		if closeClient != nil {
			// A subscription that ends by itself is not reported as a bad one in the log of go-redis.
			grace := time.NewTimer(50 * time.Millisecond)
			defer grace.Stop()
			select {
			case <-unsubscribed:
			case <-grace.C:
			}
			err = closeClient() // cuts short what is under way
		}
		<-unsubscribed
		b.calls.wait()
		return err
	})
}

// carrier takes calls of scripts to the server that has their key: a pipeline, where there is one server, or shards.
type carrier interface {
	do(ctx context.Context, c *call) error     // by whoever is quickest
	queued(ctx context.Context, c *call) error // by a goroutine that has the patience for a slow link
	begin(ctx context.Context, c *call) error  // without waiting for the answer,
	finish(ctx context.Context, c *call) error // which this does
	close()                                    // ends what was not sent
	wait()                                     // until what was sent has ended
}

// newChannel names a channel that nobody else has.
func newChannel(prefix string) string { return prefix + "notices:" + rand.Text()[:16] } // 80 bits

func isNil(client redis.UniversalClient) bool {
	switch client := client.(type) {
	case nil:
		return true
	case *redis.Client:
		return client == nil
	case *redis.ClusterClient:
		return client == nil
	case *redis.Ring:
		return client == nil
	}
	return false
}

func checkPrefix(prefix string) error {
	bad := func(r rune) bool { return r == '{' || r == '}' || unicode.IsSpace(r) || unicode.IsControl(r) }
	if len(prefix) > 128 || strings.ContainsFunc(prefix, bad) {
		return fmt.Errorf("the prefix %q has spaces, braces or more than 128 bytes: use a short name such as %q", prefix, DefaultPrefix)
	}
	return nil
}

// Capabilities implements [locker.Locker].
func (b *Backend) Capabilities() locker.Capabilities {
	early := locker.EarlyFreeRestart | locker.EarlyFreeFailover
	if b.copies > 0 && b.replicas >= b.copies {
		early &^= locker.EarlyFreeFailover // whoever takes over knows all that was granted
	}
	return locker.Capabilities{
		Backend:     name,
		MinTTL:      locker.MinTTL,
		Granularity: time.Microsecond,
		Expiry:      50 * time.Millisecond, // a waiter's timer, its jitter and its poll
		EarlyFree:   early,
		Fair:        true,
		Notifies:    true,
		Fallback:    maxPoll + 2*grace + 200*time.Millisecond, // somebody's next poll, and one after those before had their time
		Fencing:     locker.FencingCrash,
		ReportsLoss: true,
		Labels:      true,
	}
}

// Extend implements [locker.Locker].
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	if _, err := b.grantOf(lease); err != nil {
		return locker.Lease{}, b.fail("extend", lease.Key, err)
	}
	if lease.TTL < locker.MinTTL || lease.TTL > locker.MaxTTL {
		return locker.Lease{}, b.fail("extend", lease.Key, fmt.Errorf("a TTL of %v is not between %v and %v", lease.TTL, locker.MinTTL, locker.MaxTTL))
	}
	c := &call{script: extendScript, key: stateKey(b.prefix, lease.Key), args: []any{lease.ID, micros(lease.TTL)}, durable: true}
	// A worker has the patience for a link that has become slow, on which a direct call costs a connection.
	if err := b.calls.queued(ctx, c); err != nil {
		return locker.Lease{}, b.fail("extend", lease.Key, err)
	}
	if c.reply != int64(1) {
		b.notices.remove(lease.ID)
		return locker.Lease{}, locker.ErrLost
	}
	if !c.confirmed {
		return locker.Lease{}, b.fail("extend", lease.Key, errReplicas)
	}
	lease.Start = c.start
	return lease, nil
}

// Release implements [locker.Locker].
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	b.notices.remove(lease.ID)
	if lease.Token == 0 && lease.State == nil {
		_, err := b.release(ctx, lease, false, lease.ID, b.channel)
		return err
	}
	g, err := b.grantOf(lease)
	if err != nil {
		return b.fail("release", lease.Key, err)
	}
	if g.released.Load() {
		return nil
	}
	relayed := b.relay.releases(lease.Key)
	c, err := b.release(ctx, lease, relayed, lease.ID)
	b.relay.released(lease.Key)
	if err == nil {
		g.released.Store(true)
		if g.settled && c.sent == 1 {
			b.settled.put(lease.Key, lease.ID)
		}
	}
	return err
}

// release calls the script of that name.
func (b *Backend) release(ctx context.Context, lease locker.Lease, relayed bool, args ...any) (*call, error) {
	c := &call{script: releaseScript, key: stateKey(b.prefix, lease.Key), args: args, relayed: relayed}
	if err := b.calls.do(ctx, c); err != nil {
		return nil, b.fail("release", lease.Key, err)
	}
	if c.reply != int64(1) {
		return nil, locker.ErrLost
	}
	return c, nil
}

// Close implements [locker.Locker]. A client that was given to New stays open; calls that are on their way are waited
// for, which takes as long as that client's time-outs.
func (b *Backend) Close() error {
	return b.shut()
}

// grantOf refuses leases that this Backend has not granted.
func (b *Backend) grantOf(lease locker.Lease) (*grant, error) {
	if g, ok := lease.State.(*grant); ok && g.backend == b {
		return g, nil
	}
	return nil, errors.New("the lease was granted by another Locker: give it back to that one")
}

// fail wraps an error of a call. ErrClosed stays as it is.
func (b *Backend) fail(op, key string, err error) error {
	if errors.Is(err, locker.ErrClosed) || errors.Is(err, redis.ErrClosed) {
		return locker.ErrClosed
	}
	return &locker.Error{Op: op, Key: key, Backend: name, Err: explain(err)}
}

// errReplicas is the answer of a server whose replicas did not confirm in time.
var errReplicas = fmt.Errorf("too few replicas confirmed within %v: check that they are connected", replicaTimeout)

// micros rounds a time up to what the server counts in.
func micros(d time.Duration) int64 {
	return int64((d + time.Microsecond - 1) / time.Microsecond)
}

func fromMicros(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
