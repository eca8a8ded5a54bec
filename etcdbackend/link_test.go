package etcdbackend_test

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"testing"
)

// link is a way to the servers whose connections can be reset.
type link struct {
	mu    sync.Mutex
	conns []net.Conn
}

func newLink() *link { return new(link) }

func (l *link) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, c)
	return c, nil
}

func (l *link) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	l.conns = nil
}

// captureStderr returns what a function writes to this program's standard error.
func captureStderr(t *testing.T, f func()) string {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	text := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(read)
		text <- string(all)
	}()
	stderr := os.Stderr
	os.Stderr = write
	defer func() { os.Stderr = stderr }()
	f()
	_ = write.Close()
	return <-text
}
