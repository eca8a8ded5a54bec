package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// monitor watches a Redis server from outside of what is measured.
type monitor struct {
	addr string
	info *redis.Client
}

func newMonitor(addr string) *monitor {
	return &monitor{addr, redis.NewClient(&redis.Options{Addr: addr, PoolSize: 1, MinIdleConns: 1})}
}

func (m *monitor) close() error { return m.info.Close() }

// connections counts the server's clients, this one included.
func (m *monitor) connections(ctx context.Context) (n int, err error) {
	info, err := m.info.Info(ctx, "clients").Result()
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(info, "connected_clients:")
	_, err = fmt.Sscan(rest, &n)
	return n, err
}

// commands counts what clients send to the server within span. What scripts call there is not counted, and the figures of
// INFO count it: so this listens to MONITOR, which marks those calls.
func (m *monitor) commands(ctx context.Context, span time.Duration) (int64, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", m.addr)
	if err != nil {
		return 0, err
	}
	if _, err := conn.Write([]byte("MONITOR\r\n")); err != nil {
		return 0, err
	}
	var count atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(conn)
		lines.Buffer(make([]byte, 1<<20), 1<<20)
		for lines.Scan() { // ends when conn is closed
			line := lines.Bytes()
			if bytes.HasPrefix(line, []byte("+OK")) || bytes.Contains(line, []byte(" lua] ")) {
				continue
			}
			count.Add(1)
		}
	}()
	settle(ctx, span)
	n := count.Load()
	err = conn.Close()
	<-done
	return n, err
}
