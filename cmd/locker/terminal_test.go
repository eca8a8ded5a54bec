//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pty is a pseudo-terminal at which a command runs, and what it shows.
type pty struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	done   chan struct{}

	mu    sync.Mutex
	shown bytes.Buffer
	seen  int // of shown, by expect
}

// atTerminal starts a program at a terminal of its own.
func atTerminal(t *testing.T, locks, path string, args ...string) *pty {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("there are no pseudo-terminals: %v", err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	x := &pty{t: t, master: master, done: make(chan struct{})}
	x.cmd = exec.CommandContext(t.Context(), path, args...)
	x.cmd.Env = append(os.Environ(), "LOCKER_URL=file://"+locks, "LOCKER="+program, "TERM=xterm", "NO_COLOR=", "PS1=ready> ", "ENV=")
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = slave, slave, slave
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buffer := make([]byte, 4096)
		for {
			n, err := master.Read(buffer)
			x.mu.Lock()
			x.shown.Write(buffer[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		defer close(x.done)
		_ = x.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = x.cmd.Process.Kill()
		<-x.done
		_ = master.Close()
		<-read
	})
	return x
}

// types types something.
func (x *pty) types(text string) {
	x.t.Helper()
	if _, err := x.master.WriteString(text); err != nil {
		x.t.Fatal(err)
	}
}

// expect waits until the terminal shows something after what was expected before.
func (x *pty) expect(text string) {
	x.t.Helper()
	for over := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		x.mu.Lock()
		shown := x.shown.String()
		if i := strings.Index(shown[x.seen:], text); i >= 0 {
			x.seen += i + len(text)
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		if time.Now().After(over) {
			x.t.Fatalf("the terminal does not show %q but %q", text, shown)
		}
	}
}

func (x *pty) code() int {
	<-x.done
	return x.cmd.ProcessState.ExitCode()
}

// TestTerminal: the command can read from the terminal, knows it for one, and gets its Ctrl-C.
func TestTerminal(t *testing.T) {
	t.Parallel()
	x := atTerminal(t, lockFolder(t), program, "run", "--", "sh", "-c",
		`test -t 0 && test -t 1 && echo terminal; read line; echo "got $line"; trap "echo interrupted; exit 9" INT; echo go; while :; do sleep 0.02; done`)
	x.expect("terminal")
	x.types("a line\n")
	x.expect("got a line")
	x.expect("go")
	x.types("\x03")
	x.expect("interrupted")
	if code := x.code(); code != 9 {
		t.Errorf("exit code %d, want 9", code)
	}
}

// TestJobControl: Ctrl-Z gives the terminal back to the shell, fg continues, and the shell has it again at the end.
func TestJobControl(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "pid")
	x := atTerminal(t, locks, "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`"$LOCKER" run --key job --ttl 30s -- sh -c 'echo $$ >` + file + `; cat'` + "\n")
	pid := exists(t, file)
	x.types("one\n")
	x.expect("one\r\none\r\n")
	x.types("\x1a")
	x.expect("ready> ")
	x.types("echo the shell is $((40+2))\n")
	x.expect("the shell is 42")
	x.types("fg\n")
	eventually(t, "the command goes on", func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err == nil && !bytes.Contains(stat, []byte(") T "))
	})
	x.types("two\n")
	x.expect("two\r\ntwo\r\n")
	x.types("\x03")
	x.expect("ready> ")
	x.types("echo code $?\n")
	x.expect("code 130")
	x.types("exit 0\n")
	if code := x.code(); code != 0 {
		t.Errorf("the shell ended with %d", code)
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// TestLostWhileStopped: a command that was stopped for longer than its lease never goes on.
func TestLostWhileStopped(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	x := atTerminal(t, lockFolder(t), "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`"$LOCKER" run --ttl 500ms -- sh -c 'echo $$ >` + file + `; cat; echo went on'` + "\n")
	pid := exists(t, file)
	x.types("\x1a")
	x.expect("ready> ")
	time.Sleep(time.Second) // the lease
	x.types("fg\n")
	dead(t, pid)
	x.expect("was lost: expired")
	x.types("echo code $?\n")
	x.expect("code 76")
	x.mu.Lock()
	defer x.mu.Unlock()
	if strings.Contains(x.shown.String(), "\nwent on") {
		t.Errorf("it went on: %q", x.shown.String())
	}
}

// TestBreakAsks at a terminal, and refuses where nobody can be asked.
func TestBreakAsks(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "pid")
	holder := start(t, locks, "run", "--key", "job", "--grace", "100ms", "--", "sh", "-c", `echo $$ >"$0"; exec sleep 100`, file)
	exists(t, file)
	run(t, locks, "break", "job").ends(64, "give --yes")
	x := atTerminal(t, locks, program, "break", "job")
	x.expect("Take away job (held by ")
	x.types("n\n")
	x.expect("left alone")
	if code := x.code(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	x = atTerminal(t, locks, program, "break", "job")
	x.expect("[y/N]")
	x.types("y\n")
	x.expect("taken away: job")
	holder.ends(76, "taken")
}

// TestColours only on a terminal, and not where NO_COLOR is set.
func TestColours(t *testing.T) {
	t.Parallel()
	dir := lockFolder(t)
	x := atTerminal(t, dir, "/bin/sh", "-c", `"$LOCKER" check --ttl 500ms --at-once 16`)
	x.expect("\x1b[32mpassed")
	_ = x.cmd.Process.Kill()
	x = atTerminal(t, dir, "/bin/sh", "-c", `NO_COLOR=1 "$LOCKER" check --ttl 500ms --at-once 16`)
	x.expect("passed ")
	x.mu.Lock()
	if strings.Contains(x.shown.String(), "\x1b[32m") {
		t.Error("coloured in spite of NO_COLOR")
	}
	x.mu.Unlock()
	_ = x.cmd.Process.Kill()
}

// TestNohup: what the parent has ignored stays ignored.
func TestNohup(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pids")
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `trap "" HUP; exec "$0" run -- sh -c 'echo $PPID >"$0"; sleep 0.5' "$1"`, program, file)
	cmd.Env = append(os.Environ(), "LOCKER_URL=file://"+t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(exists(t, file))
	if err != nil {
		t.Fatal(err)
	}
	signalTo(t, pid, syscall.SIGHUP)
	if err := cmd.Wait(); err != nil {
		t.Errorf("an ignored SIGHUP ended it: %v", err)
	}
}
