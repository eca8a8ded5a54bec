package redisbackend

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/fec20105/locker"
)

// dialer makes the connections of our own client, and closes those that the client leaves open: a pool of go-redis that
// is closed while it dials keeps the connection.
type dialer struct {
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	timeout time.Duration
	tls     *tls.Config // nil without TLS

	mu     sync.Mutex
	open   map[*connection]struct{}
	closed bool
}

func newDialer(cfg locker.Config, timeout time.Duration, secure *tls.Config) *dialer {
	d := &dialer{dial: cfg.Dial, timeout: timeout, tls: secure, open: make(map[*connection]struct{})}
	if d.dial == nil {
		d.dial = (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext
	}
	return d
}

// connect ends with its ctx also in the middle of a TLS handshake, which go-redis' own dialer does not.
func (d *dialer) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	limit := d.timeout
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline))
	}
	ctx, cancel := context.WithTimeout(withoutDeadline{ctx}, limit)
	defer cancel()
	conn, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if d.tls != nil {
		secured := tls.Client(conn, d.tls)
		if err := secured.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		conn = secured
	}
	return d.track(conn)
}

func (d *dialer) track(conn net.Conn) (net.Conn, error) {
	c := &connection{Conn: conn, dialer: d}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	d.open[c] = struct{}{}
	if raw, ok := conn.(syscall.Conn); ok {
		return rawConnection{c, raw}, nil
	}
	return c, nil
}

// close closes what is open and refuses to make more.
func (d *dialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for c := range d.open {
		_ = c.Conn.Close() // nobody is left to care
	}
	clear(d.open)
}

// slack is how much sooner than asked for a connection's time-out may come, and for how long a connection counts as alive
// after it was heard. It is much more than a call takes, and much less than any call's patience.
const slack = 5 * time.Millisecond

// connection is known to its dialer until it is closed. go-redis sets and clears deadlines six times for each call, and each
// costs a change of a timer, after which the runtime often wakes a thread to watch it. So a deadline is passed on only when
// there is something to read or write, and if the one before does not do. Each direction is one goroutine's at a time.
type connection struct {
	net.Conn
	dialer        *dialer
	reads, writes timeout
	heard         time.Time // when something was read last
}

// timeout is the deadline of one direction.
type timeout struct{ want, set time.Time }

// prepare passes the deadline on if need be.
func (t *timeout) prepare(set func(time.Time) error) error {
	if early := t.want.Sub(t.set); t.want.IsZero() == t.set.IsZero() && 0 <= early && early <= slack {
		return nil
	}
	t.set = t.want
	return set(t.want)
}

func (c *connection) SetDeadline(t time.Time) error {
	c.reads.want, c.writes.want = t, t
	return nil
}

func (c *connection) SetReadDeadline(t time.Time) error {
	c.reads.want = t
	return nil
}

func (c *connection) SetWriteDeadline(t time.Time) error {
	c.writes.want = t
	return nil
}

func (c *connection) Read(b []byte) (int, error) {
	if err := c.reads.prepare(c.Conn.SetReadDeadline); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.heard = time.Now()
	}
	return n, err
}

func (c *connection) Write(b []byte) (int, error) {
	if err := c.writes.prepare(c.Conn.SetWriteDeadline); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *connection) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.open, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}

// rawConnection lets go-redis find out whether the server has closed it, which it asks before each call.
type rawConnection struct {
	*connection
	raw syscall.Conn
}

func (c rawConnection) SyscallConn() (syscall.RawConn, error) {
	if time.Since(c.heard) < slack {
		return alive{}, nil
	}
	if err := c.reads.prepare(c.Conn.SetReadDeadline); err != nil { // one that is over would look like a connection that is
		return nil, err
	}
	return c.raw.SyscallConn()
}

// alive is the answer of a connection that need not be looked at.
type alive struct{}

func (alive) Control(func(uintptr)) error    { return nil }
func (alive) Read(func(uintptr) bool) error  { return nil }
func (alive) Write(func(uintptr) bool) error { return nil }

// withDeadline is a ctx for our own client, which sets the deadline on the connection. It saves a timer: Done does not
// tell of the deadline.
type withDeadline struct {
	context.Context
	deadline time.Time
}

func (c withDeadline) Deadline() (time.Time, bool) { return c.deadline, true }

// withoutDeadline hides a deadline, so that a ctx made of it has a timer.
type withoutDeadline struct{ context.Context }

func (withoutDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }
