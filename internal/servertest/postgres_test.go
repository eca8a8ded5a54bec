package servertest

import (
	"bytes"
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// psql asks a server, and returns what it prints.
func psql(t *testing.T, s *Server, sql string) string {
	t.Helper()
	program, err := lookPostgres("psql")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), program, s.URL, "-XAtqc", sql).CombinedOutput()
	if err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	return string(bytes.TrimSpace(out))
}

func TestPostgresFaults(t *testing.T) {
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
			s := Postgres(t, PostgresOptions{Private: true})
			psql(t, s, "create table kept(n int); insert into kept select generate_series(1, 200)")
			if err := c.fault(s, t.Context()); err != nil {
				t.Fatal(err)
			}
			want := "f"
			if c.keeps {
				want = "t"
			}
			if got := psql(t, s, "select to_regclass('kept') is not null"); got != want {
				t.Errorf("the table is there: %s, want %s", got, want)
			}
			if c.keeps && psql(t, s, "select count(*) from kept") != "200" {
				t.Error("rows are missing")
			}
		})
	}
}

// TestPostgresPause asks on a connection that was open before: its process must stand still too.
func TestPostgresPause(t *testing.T) {
	s := Postgres(t, PostgresOptions{Private: true})
	program, err := lookPostgres("psql")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, s.URL, "-XAtq")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answers := make(chan string)
	go func() {
		defer close(answers)
		var b [64]byte
		for {
			n, err := out.Read(b[:])
			if err != nil {
				return
			}
			answers <- string(b[:n])
		}
	}()
	ask := func() {
		if _, err := in.Write([]byte("select 1;\n")); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	<-answers
	for range 5 {
		for range 2 { // a second Pause changes nothing
			if err := s.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ask()
		select {
		case got := <-answers:
			t.Fatalf("a paused server answered %q", got)
		case <-time.After(50 * time.Millisecond):
		}
		if err := s.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-answers; got != "1\n" {
			t.Fatalf("got %q", got)
		}
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	<-answers
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestPostgresSocket(t *testing.T) {
	s := Postgres(t, PostgresOptions{Private: true})
	conn, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if filepath.Dir(s.Socket) != s.guard.folder {
		t.Errorf("the socket %s is outside of the server's folder", s.Socket)
	}
}

func TestPgBouncer(t *testing.T) {
	t.Parallel()
	server := Postgres(t, PostgresOptions{Private: true})
	for _, mode := range []string{"session", "transaction", "statement"} {
		pooler := PgBouncer(t, server, mode, "default_pool_size = 1")
		if got := psql(t, pooler, "select inet_server_port()"); got != strconv.Itoa(server.port) {
			t.Errorf("in %s mode asked the server at port %s, want %d", mode, got, server.port)
		}
		if err := pooler.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		psql(t, pooler, "select 1")
	}
}
