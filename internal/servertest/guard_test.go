package servertest

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// childState tells a copy of this test program to bring a server into that state and to wait for its death.
const childState = "LOCKER_SERVERTEST_CHILD"

func child(state string) {
	ctx := context.Background()
	kind, state, _ := strings.Cut(state, "/")
	for {
		s, err := StartRedis(ctx, RedisOptions{Private: true})
		if kind == "postgres" {
			_ = s.Stop()
			s, err = StartPostgres(ctx, PostgresOptions{Private: true})
		}
		if err == nil {
			switch state {
			case "paused":
				err = s.Pause(ctx)
			case "down":
				err = s.Kill(ctx)
			case "starting":
				if err = s.Stop(); err == nil {
					continue
				}
			}
		}
		fmt.Println(state, err)
		select {}
	}
}

func TestKilledProgram(t *testing.T) {
	requireRedis(t)
	states := []string{"redis/serving", "redis/paused", "redis/down"}
	if _, err := lookPostgres("initdb"); err == nil {
		states = append(states, "postgres/serving", "postgres/paused", "postgres/down")
	}
	for _, state := range states {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			tmp := t.TempDir()
			for _, folder := range []string{tmp, filepath.Dir(tmp)} { // the server may run under another account
				if err := os.Chmod(folder, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			program := startChild(t, state, tmp)
			reached, err := bufio.NewReader(program.stdout).ReadString('\n')
			if want := path.Base(state) + " <nil>\n"; reached != want || err != nil {
				t.Fatalf("the child says %q (%v), want %q", reached, err, want)
			}
			if left := leftovers(t, tmp); len(left) < 3 {
				t.Fatalf("the child's server is not here: %q", left)
			}
			program.kill()
			expectNothingLeft(t, tmp)
		})
	}
	t.Run("starting", func(t *testing.T) {
		t.Parallel()
		for range 40 {
			tmp := t.TempDir()
			program := startChild(t, "redis/starting", tmp)
			<-time.After(rand.N(100 * time.Millisecond)) // no event to wait for: any moment will do
			program.kill()
			expectNothingLeft(t, tmp)
		}
	})
}

type program struct {
	*exec.Cmd
	t      *testing.T
	stdout *os.File
}

func startChild(t *testing.T, state, tmp string) program {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	defer w.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childState+"="+state, "TMPDIR="+tmp)
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return program{cmd, t, r}
}

// kill ends the program in the way that leaves it no time for anything.
func (p program) kill() {
	p.t.Helper()
	if err := p.Process.Kill(); err != nil {
		p.t.Error(err)
	}
	_ = p.Wait() // killed
}

func expectNothingLeft(t *testing.T, tmp string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if left = leftovers(t, tmp); len(left) == 0 {
			return
		}
		<-time.After(time.Millisecond)
	}
	t.Errorf("left behind by a killed program: %q", left)
}

func TestFolderStaysWhileAServerRuns(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	g, err := newGuard("sleeper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.alive.Close(); err != nil {
			t.Error(err)
		}
		_ = g.killer.Wait() // it killed itself
	})
	server, err := g.start([]string{"sleep", "60"})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.inUse.Close(); err != nil { // as if this program had ended and the killer were slow
		t.Fatal(err)
	}
	removed := make(chan error, 1)
	go func() { removed <- g.remover.Wait() }()
	select {
	case err := <-removed:
		t.Fatalf("the folder was removed under a running server (%v)", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := server.kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(g.folder); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}
