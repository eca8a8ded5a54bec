// Package etcdbackend keeps locks on etcd, one server or a cluster, version 3.4 or later.
//
// Importing it registers the URL schemes etcd and etcds (TLS) with [locker.Open]; [New] takes a client that the program
// already has. The path of the URL, if there is one, is the prefix of all keys:
//
//	etcd://user:password@h1:2379,h2:2379,[::1]:2379/myapp/locks
//	etcds://h1,h2,h3/myapp?ca=/etc/ssl/etcd.pem&cert=/etc/ssl/me.pem&key=/etc/ssl/me.key
//
// The parameters ca (the authority to trust instead of the system's), cert and key (a certificate of one's own) name files
// in PEM form; dial_timeout (3s) bounds the making of a connection.
//
// # What is promised
//
// A lock is granted by a transaction that most members have written down, so it survives a crash, a restart and a change of
// the leader, and so does the order of its tokens: a token is the revision in which the lock's key was created. Those who
// wait are served in the order in which they came; each watches the one before it. A lock that an operator takes away
// ([Backend.Break]) is reported at once; a key that was deleted in another way is found by the next heartbeat.
//
// Each lock has a server lease of its own. Its TTL is whole seconds, and at least what the servers demand: one and a half
// times their election timeout, 2 s unless they are set otherwise; shorter and odd TTLs are raised
// ([locker.Lease].TTL, [locker.Capabilities].MinTTL). Locks are freed up to 1.5 s after their TTL, and after a change of the leader up to
// one more TTL later: new leaders give every lease its whole TTL again.
//
// One event takes locks away early: a leader that stands still (a frozen machine, a disk that hangs), and goes on after
// another one has taken over, may revoke leases before it notices (https://github.com/etcd-io/etcd/issues/15247; seen on 3.7.3, in
// about one of ten such pauses). The holder is told at its next heartbeat, and only the token protects until then.
// A leader that dies, or is moved, does no harm.
//
// A backup that is restored takes revisions back, and with them tokens, unless it is restored with bumped revisions
// (etcdutl snapshot restore --bump-revision --mark-compacted).
//
// # What is on the server
//
// One key for each request that holds or waits: prefix, the lock's name, a NUL, the number of its lease. All are tied to
// leases, and go with them. etcd keeps the history of its keys until it is compacted, and is slower without: let it compact
// itself (--auto-compaction-retention=1h). A user with limited rights needs to read and write all keys that begin with the prefix.
package etcdbackend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/fec20105/locker"
)

var (
	_ locker.Locker    = (*Backend)(nil)
	_ locker.Inspector = (*Backend)(nil)
	_ locker.Lister    = (*Backend)(nil)
	_ locker.Breaker   = (*Backend)(nil)
)

// DefaultPrefix begins all keys unless Options says otherwise.
const DefaultPrefix = "locker/"

const (
	name = "etcd" // in errors
	// openTimeout bounds the check of the server in New.
	openTimeout = 5 * time.Second
	// lateness is how long after its TTL the server may free a lock: it looks for leases that are over every half second,
	// and revokes each by a write.
	lateness = 1500 * time.Millisecond
)

// Options are the settings of a Backend. The zero value is good.
type Options struct {
	// Prefix begins every key: programs with different prefixes do not meet. The default is DefaultPrefix.
	Prefix string
}

// Backend is a [locker.Locker] on etcd.
type Backend struct {
	client      *clientv3.Client
	leaseClient pb.LeaseClient
	layout      layout
	name        string // of this Locker among all: where its notices go
	minSeconds  int64  // the least TTL that the server grants
	opened      int64  // the revision at that time

	leases   leases
	pulse    *pulse
	confirm  *confirmer
	requests *requests
	notices  notices
	relay    relay

	mu     sync.Mutex
	closed bool
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // calls and what they have started; added to under mu while not closed, or by what is counted
	shut   func() error   // does what Close does, once
}

// New makes a Backend on a client that remains the caller's: Close does not close it. The client's settings for keepalives of
// connections (DialKeepAliveTime, 10 s is good) are what finds a connection that died silently.
//
// New asks the server at once, and returns an error that says what to do if there is none, if it refuses the user, or
// if the user may not write under the prefix.
func New(ctx context.Context, client *clientv3.Client, opts Options) (*Backend, error) {
	b, err := newBackend(ctx, client, nil, opts)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	return b, nil
}

// newBackend makes a Backend. If the client is our own, closeClient closes it.
func newBackend(ctx context.Context, client *clientv3.Client, closeClient func() error, opts Options) (*Backend, error) {
	if client == nil {
		return nil, errors.New("the client is nil: make one with clientv3.New")
	}
	if opts.Prefix == "" {
		opts.Prefix = DefaultPrefix
	}
	if len(opts.Prefix) > 256 || strings.ContainsFunc(opts.Prefix, unicode.IsControl) {
		return nil, fmt.Errorf("the prefix %q has control characters or more than 256 bytes: use a short name such as %q", opts.Prefix, DefaultPrefix)
	}
	b := &Backend{
		client:      client,
		leaseClient: pb.NewLeaseClient(client.ActiveConnection()),
		layout:      layout(opts.Prefix),
		name:        rand.Text()[:16], // 80 bits
		leases:      leases{idle: make(map[int64][]*serverLease)},
		requests:    newRequests(),
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.pulse = newPulse(b.ctx, b.leaseClient, &b.work)
	b.confirm = &confirmer{backend: b}
	b.shut = sync.OnceValue(func() error { return b.close(closeClient) })
	if err := b.checkServer(ctx); err != nil {
		b.cancel()
		b.work.Wait()
		return nil, err
	}
	return b, nil
}

// checkServer finds out early what would go wrong later, and the least TTL.
func (b *Backend) checkServer(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	// Elsewhere calls wait for a connection, and the library does not tell why there is none.
	l := newLease(1)
	err := b.grant(bounded, l, grpc.WaitForReady(false))
	if err == nil {
		b.minSeconds = int64(l.ttl / time.Second)
		l.seconds = b.minSeconds
		b.leases.put(l)
		// Rights are checked for both branches of a transaction, and so is the room in the database. This one writes nothing.
		probe := string(b.layout) + separator
		var resp *clientv3.TxnResponse
		resp, err = b.client.Txn(bounded).
			If(clientv3.Compare(clientv3.CreateRevision(probe), "=", -1)).
			Then(clientv3.OpPut(probe, "")).
			Else(clientv3.OpGet(probe, clientv3.WithPrefix(), clientv3.WithLimit(1), clientv3.WithKeysOnly())).
			Commit()
		if err == nil {
			b.opened = resp.Header.Revision
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case bounded.Err() != nil:
		return fmt.Errorf("the servers did not answer within %v: check hosts and ports: %w", openTimeout, explain(err))
	default:
		return explain(err)
	}
}

// Capabilities implements [locker.Locker].
func (b *Backend) Capabilities() locker.Capabilities {
	return locker.Capabilities{
		Backend:     name,
		MinTTL:      time.Duration(b.minSeconds) * time.Second,
		Granularity: time.Second,
		Expiry:      lateness,
		EarlyFree:   locker.EarlyFreeFailover, // see "What is promised"
		Fair:        true,
		Notifies:    true,
		Fencing:     locker.FencingFailover,
		ReportsLoss: true,
		Labels:      true,
	}
}

// members is how many servers can be asked.
func (b *Backend) members() int { return len(b.client.Endpoints()) }

// enter counts a call, so that Close waits for it, and ends its ctx with Close. Leave it when the call returns.
func (b *Backend) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, nil, locker.ErrClosed
	}
	b.work.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(b.ctx, cancel)
	return undated{ctx}, func() {
		stop()
		cancel()
		b.work.Done()
	}, nil
}

// undated is a ctx that ends like another and does not tell when: from a deadline gRPC makes a timer of its own in the
// client and one in the server, for every request.
type undated struct{ context.Context }

// Deadline is not known.
func (undated) Deadline() (deadline time.Time, ok bool) { return time.Time{}, false }

// Extend implements [locker.Locker].
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	g, err := b.grantOf(lease)
	if err == nil && lease.TTL > g.lease.ttl {
		err = fmt.Errorf("the lease was granted with a TTL of %v, which cannot be raised to %v: acquire the lock with that one", g.lease.ttl, lease.TTL)
	}
	if err != nil {
		return locker.Lease{}, b.fail(ctx, "extend", lease.Key, err)
	}
	inner, leave, err := b.enter(ctx)
	if err != nil {
		return locker.Lease{}, b.fail(ctx, "extend", lease.Key, err)
	}
	defer leave()
	start, err := b.renew(inner, g)
	if errors.Is(err, locker.ErrLost) {
		return locker.Lease{}, locker.ErrLost
	}
	if err != nil {
		return locker.Lease{}, b.fail(ctx, "extend", lease.Key, err)
	}
	lease.Start, lease.TTL = start, g.lease.ttl
	return lease, nil
}

var (
	errDeposed = errors.New("the cluster's leader changed meanwhile, so that the renewal may not count: try again")
	errMissing = errors.New("the leader does not know the server lease, although its key is there: try again")
)

// renew sends a keepalive, and asks beside it whether the lock's key is still there. Two things are to be seen:
//
//   - The lock was not taken away. A keepalive says nothing of that.
//   - The keepalive counts. A leader that has been deposed without knowing it may answer one that its successor will never
//     hear of, and the successor, who gave all leases their whole TTL when it took over, is ahead by then. The question for the
//     key is answered only by a leader whom most members still follow. If both answers are of one leader's reign, and
//     both requests were sent after the Start that is counted from, a later leader gives the lease its TTL after that Start.
func (b *Backend) renew(ctx context.Context, g *grant) (start time.Time, err error) {
	if g.hasEnded() {
		return start, locker.ErrLost
	}
	beat := b.pulse.begin(g.lease.id)
	question := b.confirm.begin(g.sub(), g.revision)
	if err := question.wait(ctx); err != nil {
		return start, err
	}
	if !question.held {
		g.end()
		return start, locker.ErrLost
	}
	if err := b.pulse.wait(ctx, beat); err != nil {
		return start, err
	}
	switch {
	case beat.ttl == 0:
		// The lease ended between the two answers, or a leader that is new has not read of it yet.
		again := b.confirm.begin(g.sub(), g.revision)
		if err := again.wait(ctx); err != nil {
			return start, err
		}
		if !again.held {
			g.end()
			return start, locker.ErrLost
		}
		return start, errMissing
	case beat.term != question.term:
		return start, errDeposed
	}
	g.lease.renewed(beat.asked)
	return g.lease.counts(), nil
}

// Close implements [locker.Locker]. A client that was given to New stays open.
func (b *Backend) Close() error { return b.shut() }

func (b *Backend) close(closeClient func() error) error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.work.Wait()
	b.revokeIdle()
	if closeClient != nil {
		return closeClient()
	}
	return nil
}

// revokeIdle takes back leases that no lock uses. It may fail: they end with their TTL.
func (b *Backend) revokeIdle() {
	const most = 500 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	for _, l := range b.leases.empty() {
		b.work.Go(func() { _ = b.revoke(ctx, l) })
	}
	b.work.Wait()
}

// grantOf refuses leases that this Backend has not granted.
func (b *Backend) grantOf(lease locker.Lease) (*grant, error) {
	if g, ok := lease.State.(*grant); ok && g.backend == b {
		return g, nil
	}
	return nil, errors.New("the lease was granted by another Locker: give it back to that one")
}
