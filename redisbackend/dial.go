package redisbackend

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
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
	only   string // if not empty, the one address to which connections are allowed
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
	ctx, cancel := bounded(ctx, d.timeout)
	defer cancel()
	conn, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if d.tls != nil {
		secured := tls.Client(conn, d.secure(addr))
		if err := secured.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		conn = secured
	}
	return d.track(conn, addr)
}

// bounded is a ctx that ends after a time at the latest, and that tells of its end also if ctx is a withDeadline.
func bounded(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline))
	}
	return context.WithTimeout(withoutDeadline{ctx}, limit)
}

// secure are the settings of TLS for one address: where the host was not known before, its certificate must be for it.
func (d *dialer) secure(addr string) *tls.Config {
	if d.tls.ServerName != "" {
		return d.tls
	}
	settings := d.tls.Clone()
	settings.ServerName, _, _ = net.SplitHostPort(addr)
	return settings
}

func (d *dialer) track(conn net.Conn, addr string) (net.Conn, error) {
	c := &connection{Conn: conn, dialer: d, addr: addr}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, errors.Join(net.ErrClosed, conn.Close())
	case d.only != "" && d.only != addr:
		return nil, errors.Join(errReplaced, conn.Close())
	}
	d.open[c] = struct{}{}
	if raw, ok := conn.(syscall.Conn); ok {
		return rawConnection{c, raw}, nil
	}
	return plainConnection{c}, nil
}

var errReplaced = errors.New("another server has taken over meanwhile")

// allow closes what leads to another address than this one, and refuses to make more of that.
func (d *dialer) allow(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.only = addr
	for c := range d.open {
		if c.addr != addr {
			delete(d.open, c)
			c.gone.Store(true)
			_ = c.Conn.Close() // nobody is told anything on it any more
		}
	}
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

// slack is how much sooner than asked for a connection's time-out may come. It is much more than a call takes, and much less than any call's patience.
const slack = 5 * time.Millisecond

// connection is known to its dialer until it is closed. go-redis sets and clears deadlines six times for each call, and each
// costs a change of a timer, after which the runtime often wakes a thread to watch it. So a deadline is passed on only when
// there is something to read or write, and if the one before does not do. Each direction is one goroutine's at a time.
type connection struct {
	net.Conn
	dialer        *dialer
	addr          string
	gone          atomic.Bool // closed by its dialer
	reads, writes timeout
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
	return c.Conn.Read(b)
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
	if c.gone.Load() {
		return nil
	}
	return c.Conn.Close()
}

// rawConnection lets go-redis find out whether the server has closed it, which it asks before each call.
type rawConnection struct {
	*connection
	raw syscall.Conn
}

// SyscallConn implements [syscall.Conn].
func (c rawConnection) SyscallConn() (syscall.RawConn, error) {
	if c.gone.Load() {
		return nil, net.ErrClosed
	}
	if !c.reads.set.IsZero() && time.Until(c.reads.set) < slack { // a deadline that is over would look like a connection that is
		if err := c.reads.prepare(c.Conn.SetReadDeadline); err != nil {
			return nil, err
		}
	}
	return c.raw.SyscallConn()
}

// plainConnection, which cannot be looked at from outside, as that of TLS, lets go-redis find out at least whether its dialer has
// closed it: a pool would hand out one after the other else.
type plainConnection struct{ *connection }

// SyscallConn implements [syscall.Conn].
func (c plainConnection) SyscallConn() (syscall.RawConn, error) {
	if c.gone.Load() {
		return nil, net.ErrClosed
	}
	return unseen{}, nil
}

// unseen is the raw connection of one that cannot be looked at.
type unseen struct{}

func (unseen) Control(func(uintptr)) error    { return nil }
func (unseen) Read(func(uintptr) bool) error  { return nil }
func (unseen) Write(func(uintptr) bool) error { return nil }

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
