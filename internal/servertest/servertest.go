// Package servertest runs real servers for this repository's tests and benchmarks: private ones, which it starts from
// the programs in PATH and can pause, crash and restart, or given ones, named by an environment variable.
//
// A private server listens on 127.0.0.1 only, works in a temporary folder, and outlives neither the test nor the
// program: also when the program is killed, no process and no folder is left (see guard). That takes a POSIX system
// with a shell.
//
//	LOCKER_TEST_REDIS=redis://…        use this server instead of a private one
//	LOCKER_TEST_ETCD=etcd://…          the same
//	LOCKER_TEST_POSTGRES=postgres://…  the same
//	LOCKER_TEST_REQUIRE=redis,etcd,…   fail instead of skip where one of these is missing
package servertest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// ErrMissing is matched by the error of a start for which the server's program is not installed.
var ErrMissing = errors.New("not installed")

// startTimeout bounds every start and clean stop of a server; the slowest here is a second.
const startTimeout = 30 * time.Second

// Server is one server. Its methods may be called from any goroutine.
type Server struct {
	URL    string      // what locker.Open takes
	Addr   string      // host:port
	Socket string      // path of its unix socket; "" if there is none
	TLS    *tls.Config // what a client needs to trust it; nil if it does not speak TLS

	kind    kind
	port    int
	guard   *guard // nil for a given server, and for one that is run elsewhere
	remote  Remote // nil for one that is not run elsewhere
	command []string

	mu      sync.Mutex
	current *process // its last run; nil if it never ran
	paused  bool
	stopped bool
}

// kind is what differs between the sorts of servers.
type kind struct {
	name string // as in LOCKER_TEST_REQUIRE
	// prepare fills the server's folder, in which the subfolder "data" is there and empty, and returns the command line.
	prepare func(folder string, port int) ([]string, error)
	// ready answers nil once this very server, and not another that took the port, serves clients.
	ready func(ctx context.Context, folder string) error

	account *syscall.Credential // under which it runs; nil: this program's
	family  bool                // it has processes of its own
	polite  syscall.Signal      // asks it to end; 0: SIGTERM
}

// start starts a private server on a port of its own and waits until it serves.
func start(ctx context.Context, k kind) (*Server, error) {
	const tries = 10
	for try := 1; ; try++ {
		port, err := FreePort(ctx)
		if err != nil {
			return nil, fmt.Errorf("servertest: start %s: %w", k.name, err)
		}
		s := &Server{kind: k, port: port, Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))}
		if s.guard, err = newGuard(k.name); err != nil {
			return nil, fmt.Errorf("servertest: start %s: %w", k.name, err)
		}
		if s.guard.account = k.account; k.account != nil {
			err = os.Chown(s.guard.folder, int(k.account.Uid), int(k.account.Gid))
		}
		if err == nil {
			err = s.prepare()
		}
		if err == nil {
			err = s.launch(ctx)
		}
		if err == nil {
			return s, nil
		}
		// Between the choice of the port and the server's own listening somebody else may have taken it.
		retry := s.current != nil && s.current.ended() && !isFree(ctx, port) && try < tries
		if err = errors.Join(s.fail("start", err), s.Stop()); !retry {
			return nil, err
		}
	}
}

// FreePort chooses a port below those that systems give to outgoing connections. A port among those could be taken by
// any client while the server is down, also by one that tries to reach it: it may connect to itself.
func FreePort(ctx context.Context) (int, error) {
	const first, last = 20000, 32767
	for range 100 {
		if port := first + rand.IntN(last-first+1); isFree(ctx, port) {
			return port, nil
		}
	}
	return 0, fmt.Errorf("found no free port between %d and %d", first, last)
}

func isFree(ctx context.Context, port int) bool {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	return err == nil && l.Close() == nil
}

// prepare makes an empty data folder and all else the server needs.
func (s *Server) prepare() error {
	data := filepath.Join(s.guard.folder, "data")
	if err := os.RemoveAll(data); err != nil {
		return err
	}
	if err := os.Mkdir(data, 0o755); err != nil {
		return err
	}
	if a := s.guard.account; a != nil {
		if err := os.Chown(data, int(a.Uid), int(a.Gid)); err != nil {
			return err
		}
	}
	var err error
	s.command, err = s.kind.prepare(s.guard.folder, s.port)
	return err
}

// launch runs the server and waits until it serves.
func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	run, err := s.guard.start(s.command)
	if err != nil {
		return err
	}
	s.current, s.paused = run, false
	if run.family = s.kind.family; s.kind.polite != 0 {
		run.polite = s.kind.polite
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		ready := s.kind.ready(ctx, s.guard.folder)
		if ready == nil {
			return nil
		}
		select {
		case <-run.done:
			return fmt.Errorf("it ended (%v); its last words:\n%s", run.cmd.ProcessState, s.Log())
		case <-ctx.Done():
			return fmt.Errorf("%w: %w; its last words:\n%s", context.Cause(ctx), ready, s.Log())
		case <-tick.C:
		}
	}
}

// Private tells whether the server is ours: only then can it be paused, crashed and restarted.
func (s *Server) Private() bool { return s.guard != nil || s.remote != nil }

// Pause stops the server's process: it keeps its connections and answers nothing until Resume.
func (s *Server) Pause(ctx context.Context) error {
	return s.do(ctx, "pause", Remote.Pause, func(run *process) error {
		if s.paused {
			return nil
		}
		err := run.pause()
		s.paused = err == nil
		return err
	})
}

// Resume lets a paused server go on.
func (s *Server) Resume(ctx context.Context) error {
	return s.do(ctx, "resume", Remote.Resume, func(run *process) error {
		s.paused = false
		return run.resume()
	})
}

// Crash kills the server with SIGKILL, and starts it again with its data.
func (s *Server) Crash(ctx context.Context) error {
	return s.do(ctx, "crash", Remote.Crash, func(run *process) error {
		if err := run.kill(); err != nil {
			return err
		}
		return s.launch(ctx)
	})
}

// Wipe kills the server with SIGKILL, and starts it again without any data.
func (s *Server) Wipe(ctx context.Context) error {
	return s.do(ctx, "wipe", Remote.Wipe, func(run *process) error {
		if err := run.kill(); err != nil {
			return err
		}
		if err := s.prepare(); err != nil {
			return err
		}
		return s.launch(ctx)
	})
}

// Restart stops the server in its own way, and starts it again with its data.
func (s *Server) Restart(ctx context.Context) error {
	return s.do(ctx, "restart", Remote.Restart, func(run *process) error {
		stopCtx, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		if err := run.stop(stopCtx); err != nil {
			return err
		}
		return s.launch(ctx)
	})
}

// Kill kills the server with SIGKILL; it stays down until Start.
func (s *Server) Kill(ctx context.Context) error {
	return s.do(ctx, "kill", Remote.Kill, (*process).kill)
}

// Start starts a server again that was killed or has ended, with its data.
func (s *Server) Start(ctx context.Context) error {
	return s.do(ctx, "start", Remote.Start, func(run *process) error {
		if !run.ended() {
			return errors.New("it is running")
		}
		return s.launch(ctx)
	})
}

// do does what needs a private server that was not stopped.
func (s *Server) do(ctx context.Context, op string, remotely func(Remote, context.Context) error, action func(*process) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	switch {
	case !s.Private():
		err = fmt.Errorf("it is not ours: unset LOCKER_TEST_%s to get a private one: %w", strings.ToUpper(s.kind.name), errors.ErrUnsupported)
	case s.stopped:
		err = errors.New("it was stopped")
	case ctx.Err() != nil:
		err = ctx.Err()
	case s.remote != nil:
		err = remotely(s.remote, ctx)
	default:
		err = action(s.current)
	}
	if err != nil {
		return s.fail(op, err)
	}
	return nil
}

func (s *Server) fail(op string, err error) error {
	return fmt.Errorf("servertest: %s the %s server at %s: %w", op, s.kind.name, s.Addr, err)
}

// Log returns the last lines that a private server wrote, for failed tests.
func (s *Server) Log() string {
	switch {
	case !s.Private():
		return ""
	case s.remote != nil:
		return lastWords([]byte(s.remote.Log()))
	}
	log, err := os.ReadFile(s.guard.logFile())
	if err != nil {
		return err.Error()
	}
	return lastWords(log)
}

func lastWords(log []byte) string {
	const most = 2000
	if len(log) > most {
		log = log[len(log)-most:]
	}
	return string(bytes.TrimSpace(log))
}

// Stop ends the server for good and removes its folder. A given server is left alone; a second Stop does nothing.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.Private() || s.stopped {
		return nil
	}
	s.stopped = true
	if s.remote != nil {
		if err := s.remote.Stop(); err != nil {
			return s.fail("stop", err)
		}
		return nil
	}
	err := s.guard.close()
	if s.current != nil {
		<-s.current.done
	}
	if err != nil {
		return s.fail("stop", err)
	}
	return nil
}

// lookPath finds the first of the programs that is installed. Where is none, the error says what to install.
func lookPath(install string, programs ...string) (string, error) {
	for _, program := range programs {
		if path, err := exec.LookPath(program); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("servertest: %s: %w (%s)", strings.Join(programs, " or "), ErrMissing, install)
}
