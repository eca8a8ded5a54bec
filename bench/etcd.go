package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"

	_ "github.com/fec20105/locker/etcdbackend"
	"github.com/fec20105/locker/internal/servertest"
)

// The server writes to its disk without waiting for it, so that the libraries are measured and not the disk.
var etcdSystem = system{
	name: "etcd",
	start: func(ctx context.Context) (string, func() error, error) {
		s, err := servertest.StartEtcd(ctx, servertest.EtcdOptions{Private: true})
		if err != nil {
			return "", nil, err
		}
		return s.URL, s.Stop, nil
	},
	watch: newEtcdMonitor,
	peers: []peer{
		{name: ours, open: openLocker},
		{name: "put, delete", open: openBareEtcd, floor: true, mute: true},
		{name: "concurrency.Mutex", open: openMutexes},
	},
}

func openEtcd(rawURL string) (*clientv3.Client, error) {
	host, err := hostOf(rawURL)
	if err != nil {
		return nil, err
	}
	return clientv3.New(clientv3.Config{Endpoints: []string{host}, Logger: zap.NewNop()}) // the library would print what cut links do to it
}

// bareEtcd ties each lock to one lease that lives as long as the client.
type bareEtcd struct {
	*clientv3.Client
	session *concurrency.Session
}

func openBareEtcd(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := openEtcd(rawURL)
	if err != nil {
		return nil, err
	}
	session, err := concurrency.NewSession(c, concurrency.WithTTL(int(ttl.Seconds())))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return bareEtcd{c, session}, nil
}

func (c bareEtcd) lock(ctx context.Context, key string) (held, error) {
	_, err := c.Put(ctx, key, "me", clientv3.WithLease(c.session.Lease()))
	return held{unlock: func() error {
		_, err := c.Delete(ctx, key)
		return err
	}}, err
}

func (c bareEtcd) close() error { return errors.Join(c.session.Close(), c.Client.Close()) }

// mutexes are etcd's own locks. Two of one Session do not exclude each other, and share one fate: so each lock has a
// Session while it is held, one that another lock has used before where there is one.
type mutexes struct {
	*clientv3.Client
	ttl time.Duration

	mu   sync.Mutex
	warm []*concurrency.Session
}

func openMutexes(_ context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := openEtcd(rawURL)
	return &mutexes{Client: c, ttl: ttl}, err
}

func (m *mutexes) lock(ctx context.Context, key string) (held, error) {
	session, err := m.session()
	if err != nil {
		return held{}, err
	}
	mutex := concurrency.NewMutex(session, key)
	if err := mutex.Lock(ctx); err != nil {
		return held{}, errors.Join(err, session.Close()) // and with it whatever the lock has left behind
	}
	return held{func() error {
		err := mutex.Unlock(ctx)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.warm = append(m.warm, session)
		return err
	}, session.Done()}, nil
}

func (m *mutexes) session() (*concurrency.Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.warm); n > 0 {
		session := m.warm[n-1]
		m.warm = m.warm[:n-1]
		return session, nil
	}
	return concurrency.NewSession(m.Client, concurrency.WithTTL(int(m.ttl.Seconds())))
}

func (m *mutexes) close() error { return m.Client.Close() }

// etcdMonitor reads the server's own figures.
type etcdMonitor struct{ figures string }

func newEtcdMonitor(_ context.Context, rawURL string) (monitor, error) {
	host, err := hostOf(rawURL)
	return &etcdMonitor{"http://" + host + "/metrics"}, err
}

func (m *etcdMonitor) close() error { return nil }

// connections counts the server's open files: those that are no connections do not come and go.
func (m *etcdMonitor) connections(ctx context.Context) (int, error) {
	n, err := m.sum(ctx, "process_open_fds ")
	return int(n), err
}

// commands counts the messages that clients send, those on streams too.
func (m *etcdMonitor) commands(ctx context.Context, span time.Duration) (int64, error) {
	before, err := m.sum(ctx, "grpc_server_msg_received_total{")
	if err != nil {
		return 0, err
	}
	settle(ctx, span)
	after, err := m.sum(ctx, "grpc_server_msg_received_total{")
	return int64(after - before), err
}

// sum adds the figures whose names begin so.
func (m *etcdMonitor) sum(ctx context.Context, name string) (total float64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.figures, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	found := false
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, name) {
			continue
		}
		var figure float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &figure); err != nil {
			return 0, err
		}
		total, found = total+figure, true
	}
	if err := lines.Err(); err != nil || !found {
		return 0, errors.Join(err, fmt.Errorf("the server tells nothing that begins with %q", name))
	}
	return total, nil
}
