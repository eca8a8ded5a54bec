package redisbackend

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

const (
	pingInterval = 10 * time.Second // of silence, after which the subscription is probed
	pingTimeout  = 5 * time.Second  // for an answer
	minBackoff   = 50 * time.Millisecond
	maxBackoff   = time.Second // between attempts to subscribe
)

// notices is the Locker's one subscription. Scripts publish on its channel that a waiter's turn may have come, or that
// a lock was taken away. A message may be lost: waiters also poll, and heartbeats find the loss. The subscription is
// opened when the first request waits or wants to be told of a loss, and never delays either.
type notices struct {
	client       subscriber
	channel      string
	pingInterval time.Duration
	lostOf       func(ctx context.Context, keys map[string]string) (ids []string) // who of these requests does not hold its key

	mu      sync.Mutex
	grants  map[string]*grant // by request ID: those that wait, or hold and want to be told of a loss
	started bool

	ctx    context.Context // ends with stop
	cancel context.CancelFunc
	checks sync.WaitGroup
	ended  chan struct{} // closed when run and checks have returned
}

// grant is a request that waits for a lock or holds it. It is the State of its lease.
type grant struct {
	backend  *Backend
	key      string
	lost     func(locker.Reason) // may be nil
	wake     chan struct{}       // buffered; nil unless the request waits
	held     bool                // by the answer to the acquire; guarded by the notices' mu
	settled  bool                // no copy of the acquire is on its way any more
	released atomic.Bool         // and answered
}

func newNotices(client subscriber, channel string) *notices {
	n := &notices{client: client, channel: channel, pingInterval: pingInterval, grants: make(map[string]*grant), ended: make(chan struct{})}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n
}

// add registers a grant, and opens the subscription if it is not open yet.
func (n *notices) add(id string, g *grant) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.grants[id] = g
	if !n.started {
		n.started = true
		go n.run()
	}
}

// granted ends a grant's wait: from now on it only wants to be told of a loss.
func (n *notices) granted(id string, g *grant) {
	n.mu.Lock()
	defer n.mu.Unlock()
	g.wake, g.held = nil, true
	if g.lost == nil {
		delete(n.grants, id)
	}
}

// remove forgets a grant, and answers nil if it was not known.
func (n *notices) remove(id string) *grant {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.grants[id]
	delete(n.grants, id)
	return g
}

// stop ends the subscription. The channel is closed when that is done: at once, unless a connection is being made.
func (n *notices) stop() (ended <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cancel()
	if !n.started {
		n.started = true
		close(n.ended)
	}
	return n.ended
}

// run keeps the subscription until stop.
func (n *notices) run() {
	defer close(n.ended)
	defer n.checks.Wait()
	stayInformed(n.ctx, n.client, n.channel, n.pingInterval, n.hear)
}

// subscriber is a client of one of go-redis' kinds.
type subscriber interface {
	Subscribe(ctx context.Context, channels ...string) *redis.PubSub
}

// stayInformed hands on what is published on a channel, that it is subscribed, whenever it is, and nil when it is no longer. It
// makes a new connection as often as that is needed, until ctx ends.
func stayInformed(ctx context.Context, client subscriber, channel string, pingInterval time.Duration, hear func(msg any)) {
	backoff := minBackoff
	for {
		if listen(ctx, client, channel, pingInterval, hear) {
			backoff = minBackoff
			hear(nil)
		}
		retry := time.NewTimer(backoff/2 + rand.N(backoff/2))
		select {
		case <-ctx.Done():
			retry.Stop()
			return
		case <-retry.C:
			backoff = min(2*backoff, maxBackoff)
		}
	}
}

// listen subscribes and passes on what it hears until the connection fails. It reports whether it heard anything.
func listen(ctx context.Context, client subscriber, channel string, pingInterval time.Duration, hear func(msg any)) (heard bool) {
	sub := client.Subscribe(ctx)
	defer sub.Close()
	defer context.AfterFunc(ctx, func() { _ = sub.Close() })()
	connect, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if err := sub.Subscribe(connect, channel); err != nil {
		return false
	}
	// With a ctx that has ended, go-redis does not connect again by itself and at once: that is for the caller to do.
	ended, cancel := context.WithCancel(ctx)
	cancel()
	for timeout := pingTimeout; ; {
		msg, err := sub.ReceiveTimeout(ended, timeout)
		switch {
		case err == nil:
			heard, timeout = true, pingInterval
			hear(msg)
		case isTimeout(err) && timeout == pingInterval && sub.Ping(ended) == nil:
			timeout = pingTimeout
		default:
			return heard
		}
	}
}

// hear passes on one message.
func (n *notices) hear(msg any) {
	switch msg := msg.(type) {
	case *redis.Subscription:
		// Messages may have been missed before: everybody looks once.
		n.mu.Lock()
		defer n.mu.Unlock()
		held := make(map[string]string)
		for id, g := range n.grants {
			g.signal()
			if g.held {
				held[id] = g.key
			}
		}
		if len(held) > 0 && n.lostOf != nil {
			n.checks.Go(func() {
				for _, id := range n.lostOf(n.ctx, held) {
					n.take(id)
				}
			})
		}
	case *redis.Message:
		what, id, _ := strings.Cut(msg.Payload, " ")
		switch what {
		case "wake":
			n.mu.Lock()
			defer n.mu.Unlock()
			if g := n.grants[id]; g != nil {
				g.signal()
			}
		case "lost":
			n.take(id)
		}
	}
}

// take tells a holder that its lock was taken away, unless it gives it up itself.
func (n *notices) take(id string) {
	if g := n.remove(id); g != nil && g.lost != nil {
		g.lost(locker.ReasonTaken)
	}
}

// signal makes a waiting request poll. It is called with the notices' mu held.
func (g *grant) signal() {
	select {
	case g.wake <- struct{}{}:
	default: // it does not wait, or will poll anyway
	}
}
