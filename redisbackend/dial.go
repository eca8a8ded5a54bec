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

// connection is known to its dialer until it is closed.
type connection struct {
	net.Conn
	dialer *dialer
}

func (c *connection) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.open, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}

// rawConnection lets go-redis find out whether the server has closed it.
type rawConnection struct {
	*connection
	syscall.Conn
}

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
