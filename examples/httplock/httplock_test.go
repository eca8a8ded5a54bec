package httplock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
)

// holdsFor names the server of a process that is a holder in one of the suite's rows.
const holdsFor = "HTTPLOCK_TEST_HOLDS_FOR"

func TestMain(m *testing.M) {
	if addr := os.Getenv(holdsFor); addr != "" {
		if err := conformance.Serve(context.Background(), open(addr)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	s := startServer(t)
	conformance.Run(t, conformance.Harness{
		TTL:       2 * time.Second,
		Open:      open(s.addr),
		Expire:    s.expire,
		Leftovers: s.leftovers,
		Server: conformance.Server{
			Pause:  s.pause,
			Resume: s.resume,
			// This server has nothing on disk, so that it always comes back empty.
			Crash:   s.restart,
			Restart: s.restart,
			Wipe:    s.restart,
		},
		Process: func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), holdsFor+"="+s.addr)
			return cmd
		},
	})
}

// open makes Backends whose traffic goes through the suite's network.
func open(addr string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(_ context.Context, network *conformance.Network) (locker.Locker, error) {
		network.LabelBy(func(written []byte) string {
			if bytes.HasPrefix(written, []byte("POST /wait ")) {
				return "notify"
			}
			return ""
		})
		return New(addr, network.DialContext), nil
	}
}

// testServer is a lock server that can be hurt.
type testServer struct {
	addr string
	gate sync.RWMutex // locked while the server is paused

	mu      sync.Mutex
	locks   *Server
	web     *http.Server
	serving sync.WaitGroup
}

func startServer(t *testing.T) *testServer {
	s := &testServer{addr: "127.0.0.1:0"}
	if err := s.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *testServer) start(ctx context.Context) error {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", s.addr)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addr = listener.Addr().String()
	s.locks = NewServer()
	web := &http.Server{Handler: s.locks, ReadHeaderTimeout: time.Minute}
	s.web = web
	s.serving.Go(func() { _ = web.Serve(gatedListener{listener, &s.gate}) }) // until it is closed
	return nil
}

// stop ends the server like a kill: nothing is answered any more.
func (s *testServer) stop() error {
	err := s.web.Close()
	s.serving.Wait()
	return err
}

func (s *testServer) restart(ctx context.Context) error {
	return errors.Join(s.stop(), s.start(ctx))
}

func (s *testServer) pause(context.Context) error {
	s.gate.Lock()
	return nil
}

func (s *testServer) resume(context.Context) error {
	s.gate.Unlock()
	return nil
}

func (s *testServer) server() *Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.locks
}

func (s *testServer) expire(_ context.Context, lease locker.Lease) error {
	server := s.server()
	server.mu.Lock()
	defer server.mu.Unlock()
	if l := server.live(lease.Key); l != nil && l.id == lease.ID {
		server.free(lease.Key, l, false)
	}
	return nil
}

// leftovers lists what is held, and the requests that are remembered; all of it has a timer.
func (s *testServer) leftovers(context.Context) (all, immortal []string, err error) {
	server := s.server()
	server.mu.Lock()
	defer server.mu.Unlock()
	for key := range server.locks {
		all = append(all, key)
	}
	for id := range server.over {
		all = append(all, id)
	}
	return all, nil, nil
}

// gatedListener lets no byte through while the gate is locked.
type gatedListener struct {
	net.Listener
	gate *sync.RWMutex
}

func (l gatedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return gatedConn{c, l.gate}, err
}

type gatedConn struct {
	net.Conn
	gate *sync.RWMutex
}

func (c gatedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.gate.RLock()
	defer c.gate.RUnlock()
	return n, err
}

func (c gatedConn) Write(b []byte) (int, error) {
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.Conn.Write(b)
}
