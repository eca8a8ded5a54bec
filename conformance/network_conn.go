package conformance

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// conn is the client's end of a connection. Two pumps carry the bytes between it and the real connection behind it;
// they outlive the client's Close, because what it has written may still be on its way.
type conn struct {
	net  *Network
	real net.Conn

	// Everything below belongs to net.mu.
	changed    *sync.Cond // what the connection's pumps, reads and writes wait for
	label      string
	up, down   []*packet
	queued     int   // bytes in up
	closed     bool  // by the client
	broken     error // ends both directions at once
	refused    bool  // the server takes no more bytes
	pumps      int   // that still run
	landing    int   // packets that Land let through and the server has not got yet
	unanswered bool  // the server has got them and not answered
	silent     bool  // the server has ended the connection: it answers nothing more
	swallow    chan struct{}

	readBy, writeBy       time.Time
	readTimer, writeTimer *time.Timer
}

// packet is what one write or read carried, or the end of the stream.
type packet struct {
	flight  flight
	data    []byte
	end     error         // instead of data
	swallow chan struct{} // what SwallowReply had armed when it was sent
}

// window is how much a client can write while nothing is delivered, about as much as a kernel would take.
const window = 4 << 20

func (n *Network) connect(real net.Conn) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		_ = real.Close()
		return nil, &net.OpError{Op: "dial", Net: real.RemoteAddr().Network(), Addr: real.RemoteAddr(), Err: net.ErrClosed}
	}
	c := &conn{net: n, real: real, changed: sync.NewCond(&n.mu), pumps: 2}
	n.conns[c] = true
	n.stats.Dials++
	n.started.Go(c.pumpUp)
	n.started.Go(c.pumpDown)
	return c, nil
}

// Read waits for what the server has sent.
func (c *conn) Read(b []byte) (int, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for {
		if err := c.usable("read", c.readBy); err != nil || len(b) == 0 {
			return 0, err
		}
		if len(c.down) > 0 && c.net.arrives(&c.down[0].flight) {
			p := c.down[0]
			if p.end != nil {
				return 0, p.end
			}
			read := copy(b, p.data)
			c.net.stats.BytesDown += int64(read)
			if p.data = p.data[read:]; len(p.data) == 0 {
				c.down = c.down[1:]
			}
			return read, nil
		}
		c.net.wait(c.changed)
	}
}

// Write sends b on its way; like a kernel it does not wait for its arrival.
func (c *conn) Write(b []byte) (int, error) {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if err := c.usable("write", c.writeBy); err != nil {
			return 0, err
		}
		if c.refused {
			return 0, c.opError("write", syscall.EPIPE)
		}
		if c.queued < window {
			break
		}
		n.wait(c.changed)
	}
	if c.label == "" && n.labelBy != nil {
		c.label = n.labelBy(b)
	}
	n.countRequest(b)
	c.queued += len(b)
	c.up = append(c.up, &packet{
		flight: n.takeOff(c.label, true, c.changed), data: append([]byte(nil), b...), swallow: n.swallow,
	})
	c.changed.Broadcast()
	return len(b), nil
}

// Close ends the connection for the client. What was written before still goes its way, and then the news of the end.
func (c *conn) Close() error {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	c.down = nil
	for _, timer := range []*time.Timer{c.readTimer, c.writeTimer} {
		if timer != nil {
			timer.Stop()
		}
	}
	c.up = append(c.up, &packet{flight: n.takeOff(c.label, true, c.changed), end: io.EOF})
	c.changed.Broadcast()
	return nil
}

// usable is the error of a call that cannot go on.
func (c *conn) usable(op string, by time.Time) error {
	switch {
	case c.closed:
		return c.opError(op, net.ErrClosed)
	case c.broken != nil:
		return c.opError(op, c.broken)
	case !by.IsZero() && !by.After(time.Now()):
		return c.opError(op, os.ErrDeadlineExceeded)
	}
	return nil
}

func (c *conn) opError(op string, err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: c.RemoteAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// LocalAddr is that of the real connection.
func (c *conn) LocalAddr() net.Addr { return c.real.LocalAddr() }

// RemoteAddr is that of the real connection.
func (c *conn) RemoteAddr() net.Addr { return c.real.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline ends reads at t, those that wait already too.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readBy, &c.readTimer, t) }

// SetWriteDeadline ends writes at t.
func (c *conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(&c.writeBy, &c.writeTimer, t)
}

func (c *conn) setDeadline(by *time.Time, timer **time.Timer, t time.Time) error {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if *by = t; !t.IsZero() {
		left := time.Until(t)
		*by = time.Now().Add(left) // on the monotonic clock, and read first: the timer does not fire before it
		if *timer == nil {
			*timer = time.AfterFunc(left, n.waker(c.changed))
		} else {
			(*timer).Reset(left)
		}
	}
	c.changed.Broadcast()
	return nil
}

// land lets through what is held now, but not the end of the stream: many servers drop the requests of a client that
// they see go.
func (c *conn) land() {
	for _, p := range c.up {
		if p.end == nil && !p.flight.landed {
			p.flight.landed = true
			c.landing++
		}
	}
	c.changed.Broadcast()
}

// answered is true if all that has landed has reached the server, and it has answered.
func (c *conn) answered() bool { return c.landing == 0 && !c.unanswered }

// reset ends the connection at once, for both sides.
func (c *conn) reset(why error) {
	if c.broken != nil {
		return
	}
	c.broken = why
	c.up, c.down = nil, nil
	c.landing, c.unanswered = 0, false
	if tcp, ok := c.real.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // the server gets a reset, not an end; if it cannot, an end must do
	}
	_ = c.real.Close()
	c.changed.Broadcast()
}

// pumpUp carries packets to the server.
func (c *conn) pumpUp() {
	defer c.pumpEnds()
	for {
		p := c.nextUp()
		if p == nil {
			return
		}
		if p.end != nil {
			_ = c.real.Close()
			return
		}
		if _, err := c.real.Write(p.data); err != nil {
			c.refuse() // and what the server has said before can still be read
			return
		}
	}
}

// nextUp waits for a packet that arrives. It is nil when the connection is broken.
func (c *conn) nextUp() *packet {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if c.broken != nil {
			return nil
		}
		if len(c.up) > 0 && n.arrives(&c.up[0].flight) {
			p := c.up[0]
			c.up = c.up[1:]
			c.queued -= len(p.data)
			c.swallow = p.swallow
			if p.flight.landed {
				c.landing--
				c.unanswered = !c.silent
			}
			c.changed.Broadcast()
			return p
		}
		n.wait(c.changed)
	}
}

// pumpDown carries packets from the server.
func (c *conn) pumpDown() {
	defer c.pumpEnds()
	buffer := make([]byte, 64<<10)
	for {
		size, err := c.real.Read(buffer)
		if size > 0 && !c.fromServer(&packet{data: append([]byte(nil), buffer[:size]...)}) {
			return
		}
		if err != nil {
			c.fromServer(&packet{end: err})
			return
		}
	}
}

// fromServer starts a packet's way down. It is false when the connection is at its end.
func (c *conn) fromServer(p *packet) bool {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.broken != nil {
		return false
	}
	if c.landing == 0 || p.end != nil {
		c.landing, c.unanswered = 0, false
		c.silent = p.end != nil
	}
	if p.end == nil {
		n.stats.Replies++
		if n.swallows(c.swallow) {
			return false
		}
	}
	if !c.closed {
		p.flight = n.takeOff(c.label, false, c.changed)
		c.down = append(c.down, p)
	}
	c.changed.Broadcast()
	return true
}

// refuse remembers that the server cannot be written to.
func (c *conn) refuse() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.refused = true
	c.up = nil
	c.landing, c.unanswered = 0, false
	c.changed.Broadcast()
}

// pumpEnds forgets the connection after its last pump.
func (c *conn) pumpEnds() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.pumps--; c.pumps == 0 {
		_ = c.real.Close()
		delete(c.net.conns, c)
	}
}
