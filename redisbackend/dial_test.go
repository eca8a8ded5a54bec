package redisbackend

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// counted counts the deadlines that a connection is given.
type counted struct {
	*net.TCPConn
	deadlines int
}

func (c *counted) SetReadDeadline(t time.Time) error {
	c.deadlines++
	return c.TCPConn.SetReadDeadline(t)
}

func (c *counted) SetWriteDeadline(t time.Time) error {
	c.deadlines++
	return c.TCPConn.SetWriteDeadline(t)
}

// connected makes a connection of a dialer, with its other end.
func connected(t *testing.T) (conn, server net.Conn, inner *counted) {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d := newDialer(locker.Config{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		inner = &counted{TCPConn: conn.(*net.TCPConn)}
		return inner, nil
	}}, time.Second, nil)
	if conn, err = d.connect(t.Context(), "tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(conn.Close(), server.Close()) })
	return conn, server, inner
}

// usable does what go-redis does before each call.
func usable(t *testing.T, conn net.Conn) bool {
	t.Helper()
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	open := true
	err = raw.Read(func(fd uintptr) bool {
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		open = n > 0 || err != nil
		return true
	})
	return open && err == nil
}

// exchange makes a call with that patience.
func exchange(t *testing.T, conn, server net.Conn, patience time.Duration) {
	t.Helper()
	if !usable(t, conn) {
		t.Fatal("the connection counts as closed")
	}
	buf := make([]byte, 1)
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := conn.Write(buf); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(buf); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write(buf); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := conn.Read(buf); err != nil {
		t.Fatal(err)
	}
}

// silence waits for an answer that does not come, and tells how long.
func silence(t *testing.T, conn net.Conn, patience time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	_ = conn.SetReadDeadline(began.Add(patience))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Read = %v, want a time-out", err)
	}
	return time.Since(began)
}

func TestDeadlinesOfConnections(t *testing.T) {
	t.Parallel()
	conn, server, inner := connected(t)
	const calls = 100
	begun := time.Now()
	for range calls {
		exchange(t, conn, server, time.Minute)
	}
	if most := 2 + 2*int(time.Since(begun)/slack); inner.deadlines > min(most, calls) {
		t.Errorf("%d deadlines were set for %d calls in a row", inner.deadlines, calls)
	}
	// A shorter one than that which stands, one that is over, and one after it.
	for _, patience := range []time.Duration{60 * time.Millisecond, 20 * time.Millisecond, 40 * time.Millisecond} {
		if took := silence(t, conn, patience); took < patience-slack || took > patience+time.Second {
			t.Errorf("with a patience of %v it took %v", patience, took)
		}
	}
	exchange(t, conn, server, 30*time.Millisecond)
	// None at all, after the last one is over.
	_ = conn.SetReadDeadline(time.Time{})
	time.AfterFunc(50*time.Millisecond, func() { _, _ = server.Write(make([]byte, 1)) })
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Errorf("without a deadline: %v", err)
	}
	exchange(t, conn, server, time.Minute)
}

func TestClosedConnectionIsSeen(t *testing.T) {
	t.Parallel()
	conn, server, _ := connected(t)
	exchange(t, conn, server, 10*time.Millisecond)
	<-time.NewTimer(20 * time.Millisecond).C // its deadline is over
	if !usable(t, conn) {
		t.Error("the connection counts as closed because of a deadline that was cleared")
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); usable(t, conn); {
		if time.Now().After(end) {
			t.Fatal("a connection that the server has closed counts as usable")
		}
	}
	// Also right after something was heard on it: the next call would fail.
	conn, server, _ = connected(t)
	exchange(t, conn, server, time.Minute)
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	<-time.NewTimer(2 * time.Millisecond).C
	if usable(t, conn) {
		t.Error("a connection that the server has just closed counts as usable")
	}
}
