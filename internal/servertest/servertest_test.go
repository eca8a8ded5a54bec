package servertest

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if state := os.Getenv(childState); state != "" {
		child(state)
	}
	os.Exit(m.Run())
}

func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(*Server, context.Context) error
		keeps bool
	}{
		{"Crash", (*Server).Crash, true},
		{"Restart", (*Server).Restart, true},
		{"Wipe", (*Server).Wipe, false},
		{"KillAndStart", killAndStart, true},
		{"CrashWhilePaused", pausedThen((*Server).Crash), true},
		{"RestartWhilePaused", pausedThen((*Server).Restart), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := Redis(t, RedisOptions{Private: true})
			redis := dial(t, s)
			for i := range 200 {
				redis.ask(fmt.Sprintf("SET key%d %d", i, i), "+OK")
			}
			if err := c.fault(s, t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := redis.replies.ReadByte(); err == nil {
				t.Fatal("the connection has survived")
			}
			want := ":0"
			if c.keeps {
				want = ":200"
			}
			dial(t, s).ask("DBSIZE", want)
		})
	}
}

func killAndStart(s *Server, ctx context.Context) error {
	if err := s.Kill(ctx); err != nil {
		return err
	}
	if conn, err := net.Dial("tcp", s.Addr); err == nil {
		return errors.Join(errors.New("somebody listens at a killed server's address"), conn.Close())
	}
	return s.Start(ctx)
}

func pausedThen(fault func(*Server, context.Context) error) func(*Server, context.Context) error {
	return func(s *Server, ctx context.Context) error {
		return errors.Join(s.Pause(ctx), fault(s, ctx))
	}
}

func TestPause(t *testing.T) {
	s := Redis(t, RedisOptions{Private: true})
	redis := dial(t, s)
	for range 20 {
		for range 2 { // a second Pause changes nothing
			if err := s.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		redis.send("PING")
		if err := redis.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := redis.replies.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a paused server answered: %v", err)
		}
		if err := s.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		redis.expect("+PONG")
	}
}

func TestOptions(t *testing.T) {
	t.Run("Password", func(t *testing.T) {
		s := Redis(t, RedisOptions{Password: "open sesame"})
		if want := "redis://:open%20sesame@" + s.Addr; s.URL != want {
			t.Errorf("URL is %q, want %q", s.URL, want)
		}
		redis := dial(t, s)
		redis.ask("PING", "-NOAUTH")
		redis.ask(`AUTH "open sesame"`, "+OK")
	})
	t.Run("TLS", func(t *testing.T) {
		s := Redis(t, RedisOptions{TLS: true})
		if want := "rediss://" + s.Addr; s.URL != want {
			t.Errorf("URL is %q, want %q", s.URL, want)
		}
		if err := s.Wipe(t.Context()); err != nil { // the same certificate is trusted afterwards
			t.Fatal(err)
		}
		conn, err := tls.Dial("tcp", s.Addr, s.TLS)
		if err != nil {
			t.Fatal(err)
		}
		newClient(t, conn).ask("PING", "+PONG")
		if _, err := tls.Dial("tcp", s.Addr, nil); err == nil {
			t.Error("a client that does not know the certificate trusts it")
		}
	})
	t.Run("Args", func(t *testing.T) {
		primary := Redis(t, RedisOptions{Private: true})
		replica := Redis(t, RedisOptions{Args: []string{"--replicaof", strings.Replace(primary.Addr, ":", " ", 1)}})
		dial(t, replica).ask("SET a 1", "-READONLY")
	})
	t.Run("Socket", func(t *testing.T) {
		s := Redis(t, RedisOptions{Private: true})
		conn, err := net.Dial("unix", s.Socket)
		if err != nil {
			t.Fatal(err)
		}
		newClient(t, conn).ask("PING", "+PONG")
	})
}

func TestGivenServer(t *testing.T) {
	private := Redis(t, RedisOptions{Private: true})
	t.Setenv("LOCKER_TEST_REDIS", private.URL)
	given := Redis(t, RedisOptions{})
	if given.Private() || given.URL != private.URL || given.Addr != private.Addr {
		t.Errorf("got %+v, want the server at %s", given, private.URL)
	}
	if err := given.Crash(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Crash answered %v, want ErrUnsupported", err)
	}
	if err := given.Stop(); err != nil {
		t.Error(err)
	}
	dial(t, private).ask("PING", "+PONG")
	if !Redis(t, RedisOptions{Private: true}).Private() {
		t.Error("a private server was asked for")
	}

	if err := private.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(private.Addr)
	for _, bad := range []string{"redis://:secret@127.0.0.1:" + port, "http://:secret@" + private.Addr, "redis://:secret@%zz", "secret"} {
		t.Setenv("LOCKER_TEST_REDIS", bad)
		_, err := StartRedis(t.Context(), RedisOptions{})
		if err == nil || !strings.Contains(err.Error(), "LOCKER_TEST_REDIS") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error does not help, or tells the secret: %v", bad, err)
		}
	}
}

func TestPortTakenMeanwhile(t *testing.T) {
	requireRedis(t)
	program, err := lookPath("", "redis-server", "valkey-server")
	if err != nil {
		t.Fatal(err)
	}
	var ports []int
	s, err := start(t.Context(), kind{
		name: "redis",
		prepare: func(folder string, port int) ([]string, error) {
			ports = append(ports, port)
			if len(ports) <= 2 {
				l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { l.Close() })
			}
			return append([]string{program}, redisArgs(folder, port, RedisOptions{})...), nil
		},
		ready: func(ctx context.Context, folder string) error { return pingRedis(ctx, "unix", redisSocket(folder), "") },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	}()
	if len(ports) != 3 || s.port != ports[2] {
		t.Errorf("serves at %d after trying %v, want the third", s.port, ports)
	}
}

func TestStartFails(t *testing.T) {
	requireRedis(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	_, err := StartRedis(t.Context(), RedisOptions{Args: []string{"--no-such-directive", "1"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-directive") {
		t.Errorf("the server's last words are missing: %v", err)
	}
	if left := leftovers(t, tmp); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = start(ctx, kind{
		name:    "sleeper",
		prepare: func(string, int) ([]string, error) { return []string{"sleep", "60"}, nil },
		ready:   func(context.Context, string) error { return errors.New("asleep") },
	})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "asleep") {
		t.Errorf("a server that does not get ready: %v", err)
	}
	if left := leftovers(t, tmp); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestStop(t *testing.T) {
	requireRedis(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	s, err := StartRedis(t.Context(), RedisOptions{Private: true})
	if err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, tmp); len(left) < 2 {
		t.Fatalf("the search for leftovers finds nothing of a running server: %q", left)
	}
	for range 2 {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	}
	if left := leftovers(t, tmp); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := s.Crash(t.Context()); err == nil {
		t.Error("a stopped server was started again")
	}
}

func TestMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("LOCKER_TEST_REDIS", "")
	for _, c := range []struct{ require, verdict, says string }{
		{"", "skip", "apt-get install redis-server"},
		{"etcd", "skip", "apt-get install redis-server"},
		{"etcd,redis", "fatal", "apt-get install redis-server"},
		{"reddis", "fatal", "redis, etcd, postgres, containers"},
	} {
		t.Setenv("LOCKER_TEST_REQUIRE", c.require)
		judge := &judge{TB: t}
		done := make(chan struct{})
		go func() {
			defer close(done)
			Redis(judge, RedisOptions{})
		}()
		<-done
		if judge.verdict != c.verdict || !strings.Contains(judge.reason, c.says) {
			t.Errorf("LOCKER_TEST_REQUIRE=%s: %s: %s, want %s: …%s…", c.require, judge.verdict, judge.reason, c.verdict, c.says)
		}
	}
}

// judge is a test that notes how it ends.
type judge struct {
	testing.TB
	verdict, reason string
}

func (j *judge) Skip(args ...any)                  { j.end("skip", fmt.Sprint(args...)) }
func (j *judge) Fatal(args ...any)                 { j.end("fatal", fmt.Sprint(args...)) }
func (j *judge) Fatalf(format string, args ...any) { j.end("fatal", fmt.Sprintf(format, args...)) }

func (j *judge) end(verdict, reason string) {
	j.verdict, j.reason = verdict, reason
	runtime.Goexit()
}

// requireRedis skips a test that starts its Redis in its own way.
func requireRedis(t *testing.T) {
	t.Helper()
	if _, err := lookPath("apt-get install redis-server", "redis-server", "valkey-server"); err != nil {
		Skip(t, "redis", err.Error())
	}
}

// leftovers names what is left of servers that were started in the temporary folder tmp: files, and processes that
// work there or whose command line tells of it. (Redis writes over its command line.)
func leftovers(t *testing.T, tmp string) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		command, _ := os.ReadFile(filepath.Join(process, "cmdline")) // the process may have ended meanwhile
		cwd, _ := os.Readlink(filepath.Join(process, "cwd"))
		if about := string(command) + " in " + cwd; strings.Contains(about, tmp) {
			left = append(left, strings.ReplaceAll(about, "\x00", " "))
		}
	}
	return left
}

// client speaks just enough of Redis' protocol.
type client struct {
	t       *testing.T
	conn    net.Conn
	replies *bufio.Reader
}

func dial(t *testing.T, s *Server) client {
	t.Helper()
	conn, err := net.Dial("tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, conn)
}

func newClient(t *testing.T, conn net.Conn) client {
	t.Cleanup(func() { conn.Close() })
	return client{t, conn, bufio.NewReader(conn)}
}

func (c client) ask(command, want string) {
	c.t.Helper()
	c.send(command)
	c.expect(want)
}

func (c client) send(command string) {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.conn, "%s\r\n", command); err != nil {
		c.t.Fatal(err)
	}
}

func (c client) expect(want string) {
	c.t.Helper()
	if err := c.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		c.t.Fatal(err)
	}
	reply, err := c.replies.ReadString('\n')
	if err != nil || !strings.HasPrefix(reply, want) {
		c.t.Fatalf("got the reply %q (%v), want %q", reply, err, want)
	}
}
