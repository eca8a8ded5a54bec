package conformance

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Network is one client's link to its servers, and the place where faults are injected. Connections are made with
// DialContext or Dial; a backend without connections is wrapped with Wrap. A fault holds for all connections, those
// made later too, until Heal. It is safe for concurrent use.
//
// A link behaves like TCP: nothing that a client has written is lost by a fault that passes. What could not be
// delivered arrives after Heal, also when its sender has given up and closed the connection meanwhile: that is how
// requests arrive late on real networks.
type Network struct {
	mu      sync.Mutex // of everything below, and of the connections and calls
	changed *sync.Cond // what dials wait for; each connection and call has one of its own
	wakeUps int        // of waiting goroutines, to see that a packet wakes nobody whom it does not concern
	faults  faults
	swallow chan struct{} // not nil: SwallowReply is armed; closed when it has happened
	closed  bool

	labelBy func(written []byte) string
	gates   map[string]bool // the labels that have a Gate
	conns   map[*conn]bool  // until both their pumps have ended
	calls   map[*call]bool  // of wrapped Lockers, until they have ended at the server
	late    []func() error  // what Close still has to close
	stats   Stats
	naming  []*naming
	started sync.WaitGroup // pumps and calls
}

// faults are the conditions of a link.
type faults struct {
	cut, hung, held bool
	cutLabels       map[string]bool
	up, down        time.Duration
}

// Stats counts what went over a link. Writes of the client are requests, reads of answers are replies; so are the
// calls of a wrapped Locker, with the bytes of their key and ID.
type Stats struct {
	BytesUp, BytesDown int64 // that the client has sent, and that have reached it
	Requests, Replies  int64
	Dials              int // connections made
	Open               int // connections that the client has not closed
}

// naming counts the requests that contain a text.
type naming struct {
	text  []byte
	count int64
}

// flight is a packet's way in one direction.
type flight struct {
	label  string
	up     bool
	due    time.Time // it arrives no earlier
	landed bool      // Land lets it through
}

// NewNetwork makes a link without faults. Close it after use.
func NewNetwork() *Network {
	n := &Network{gates: make(map[string]bool), conns: make(map[*conn]bool), calls: make(map[*call]bool)}
	n.changed = sync.NewCond(&n.mu)
	return n
}

// DialContext connects to a server, as net.Dialer's does.
func (n *Network) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if err := n.reach(ctx); err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	var dialer net.Dialer
	real, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return n.connect(real)
}

// Dial connects to a TCP server: DialContext in the shape that gRPC wants.
func (n *Network) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return n.DialContext(ctx, "tcp", addr)
}

// reach waits until a server can be reached: a connection is made where a packet goes there and back. Servers that
// hang accept connections, too.
func (n *Network) reach(ctx context.Context) error {
	defer context.AfterFunc(ctx, n.waker(n.changed))()
	n.mu.Lock()
	defer n.mu.Unlock()
	due := n.after(n.faults.up+n.faults.down, n.changed)
	for {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case n.closed:
			return net.ErrClosed
		case !n.faults.cut && !due.After(time.Now()):
			return nil
		}
		n.wait(n.changed)
	}
}

// LabelBy gives connections labels, so that Cut can tell them apart. The function gets what a client writes, write by
// write, until it answers something else than "". Rows know the label "notify": of connections that carry wake-ups and
// no requests. It must not call the Network.
func (n *Network) LabelBy(label func(written []byte) string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.labelBy = label
}

// Gate is for a backend without connections that can lose a wake-up: passes tells whether a packet with this label
// gets through at the moment.
func (n *Network) Gate(label string) (passes func() bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gates[label] = true
	return func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.passes(&flight{label: label})
	}
}

// Has is true if a Gate or an open connection has the label.
func (n *Network) Has(label string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.conns {
		if c.label == label && !c.closed {
			return true
		}
	}
	return n.gates[label]
}

// Cut lets every packet vanish, both ways, the end of a connection included: to the server a client that is cut and
// closes its connections has vanished half-open. Dials wait. With labels, only connections with one of them are cut.
func (n *Network) Cut(labels ...string) {
	n.change(func(f *faults) {
		f.cut = f.cut || len(labels) == 0
		for _, label := range labels {
			if f.cutLabels == nil {
				f.cutLabels = make(map[string]bool)
			}
			f.cutLabels[label] = true
		}
	})
}

// Hang makes the servers look stopped: they accept connections and bytes, and nothing happens.
func (n *Network) Hang() { n.change(func(f *faults) { f.hung = true }) }

// Delay makes each packet take that long, to the server and from it.
func (n *Network) Delay(up, down time.Duration) {
	n.change(func(f *faults) { f.up, f.down = up, down })
}

// Hold keeps all requests on their way from now on; replies arrive.
func (n *Network) Hold() { n.change(func(f *faults) { f.held = true }) }

// Land delivers the requests that are held so far, also those whose senders have given up, and returns when each
// connection that carried one has been answered. Requests made later are held as before. A connection may have carried
// nothing that is answered, such as the acknowledgement of a ping: once another one was answered it is not waited for
// any longer than muteFor.
func (n *Network) Land(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.wakeAll()
	})()
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.conns {
		c.land()
	}
	for c := range n.calls {
		c.land()
	}
	landing := slices.DeleteFunc(slices.Collect(maps.Keys(n.conns)), func(c *conn) bool { return c.landing == 0 })
	for _, c := range landing {
		mute := n.after(muteFor, c.changed)
		for !c.answered() && ctx.Err() == nil {
			if !mute.After(time.Now()) {
				if c.landing == 0 && slices.ContainsFunc(landing, (*conn).answered) {
					break
				}
				mute = n.after(muteFor, c.changed)
			}
			n.wait(c.changed)
		}
	}
	for _, c := range slices.Collect(maps.Keys(n.calls)) {
		for c.landing && ctx.Err() == nil {
			n.wait(c.changed)
		}
	}
	return ctx.Err()
}

// muteFor is how long a server may take to answer what has landed, when it has answered on another connection.
const muteFor = 100 * time.Millisecond

// Reset resets every connection now, for both sides and also where it is cut; new ones can be made.
func (n *Network) Reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reset()
}

func (n *Network) reset() {
	for c := range n.conns {
		c.reset(syscall.ECONNRESET)
	}
	for c := range n.calls {
		c.reset(syscall.ECONNRESET)
	}
}

// SwallowReply drops the first reply to a request that is sent from now on, after the server has acted on it, and
// resets the link then: a stream of bytes with a hole would be another fault. The channel is closed when it has
// happened. Nobody can tell replies apart here: on a connection on which an earlier request is still unanswered, it is
// that one's reply which is dropped, and the new request may not have arrived.
func (n *Network) SwallowReply() (swallowed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.swallow = make(chan struct{})
	return n.swallow
}

// swallows drops the reply to a request that was sent with this swallow, if it is armed still.
func (n *Network) swallows(swallow chan struct{}) bool {
	if swallow == nil || swallow != n.swallow {
		return false
	}
	n.swallow = nil
	n.reset()
	close(swallow)
	return true
}

// Heal undoes all faults. What was kept back arrives.
func (n *Network) Heal() {
	n.change(func(f *faults) { *f = faults{} })
	n.mu.Lock()
	defer n.mu.Unlock()
	n.swallow = nil
	for c := range n.calls {
		if c.abandoned && c.arrived {
			c.ctx.end(context.Canceled)
		}
	}
}

// Stats counts what has gone over the link so far.
func (n *Network) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	stats := n.stats
	for c := range n.conns {
		if !c.closed {
			stats.Open++
		}
	}
	return stats
}

// Naming counts the requests that contain text, from now on: those that name a key, for example. It looks at each write
// of the client alone, and sees nothing in what is encrypted or hashed.
func (n *Network) Naming(text string) (requests func() int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	name := &naming{text: []byte(text)}
	n.naming = append(n.naming, name)
	return func() int64 {
		n.mu.Lock()
		defer n.mu.Unlock()
		return name.count
	}
}

// Close ends all connections and calls, and waits for everything that the Network has started.
func (n *Network) Close() error {
	n.mu.Lock()
	n.closed = true
	for c := range n.conns {
		c.reset(net.ErrClosed)
	}
	for c := range n.calls {
		c.reset(net.ErrClosed)
	}
	n.changed.Broadcast()
	late := n.late
	n.late = nil
	n.mu.Unlock()
	var errs []error
	for _, f := range late {
		errs = append(errs, f())
	}
	n.started.Wait()
	return errors.Join(errs...)
}

func (n *Network) change(set func(*faults)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	set(&n.faults)
	n.wakeAll()
}

// wakeAll makes every waiting goroutine look again: for what concerns the whole link.
func (n *Network) wakeAll() {
	n.changed.Broadcast()
	for c := range n.conns {
		c.changed.Broadcast()
	}
	for c := range n.calls {
		c.changed.Broadcast()
	}
}

// waker makes those look again who wait for one thing: for timers and the ends of contexts.
func (n *Network) waker(changed *sync.Cond) func() {
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		changed.Broadcast()
	}
}

// wait waits for the next change.
func (n *Network) wait(changed *sync.Cond) {
	changed.Wait()
	n.wakeUps++
}

// after is the moment in d from now, at which those who wait for the change look again.
func (n *Network) after(d time.Duration, changed *sync.Cond) time.Time {
	due := time.Now().Add(d)
	if d > 0 {
		time.AfterFunc(d, n.waker(changed)) // not before due, which was read first
	}
	return due
}

// takeOff starts a flight under the present delay. Its end is a change.
func (n *Network) takeOff(label string, up bool, changed *sync.Cond) flight {
	if up {
		return flight{label: label, up: true, due: n.after(n.faults.up, changed)}
	}
	return flight{label: label, due: n.after(n.faults.down, changed)}
}

// passes is true if no fault stops the flight.
func (n *Network) passes(f *flight) bool {
	held := n.faults.held && f.up && !f.landed
	return !n.faults.cut && !n.faults.hung && !n.faults.cutLabels[f.label] && !held
}

// arrives is true if the flight is over: nothing stops it and its delay has passed.
func (n *Network) arrives(f *flight) bool { return n.passes(f) && !f.due.After(time.Now()) }

// countRequest counts one request, whose text is in one or more parts.
func (n *Network) countRequest(parts ...[]byte) {
	n.stats.Requests++
	for _, part := range parts {
		n.stats.BytesUp += int64(len(part))
	}
	for _, name := range n.naming {
		for _, part := range parts {
			if bytes.Contains(part, name.text) {
				name.count++
				break
			}
		}
	}
}
