//go:build linux

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stopped waits until a process is stopped, or is not any more.
func stopped(t *testing.T, pid string, want bool) {
	t.Helper()
	eventually(t, "whether process "+pid+" is stopped", func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err == nil && bytes.Contains(stat, []byte(") T ")) == want
	})
}

// TestPipeline: beside others in a pipeline the command leaves the terminal to them, and gets it when it asks.
func TestPipeline(t *testing.T) {
	t.Parallel()
	x := atTerminal(t, lockFolder(t), "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`"$LOCKER" run -- sh -c 'echo come; sleep 1' | { read word; echo "wel$word"; read line </dev/tty; echo "got $line"; }` + "\n")
	x.expect("welcome")
	x.types("one\n")
	x.expect("got one")
	x.expect("ready> ")
	x.types(`echo password | "$LOCKER" run -- sh -c 'echo asking; read line </dev/tty; read word; echo "$line and $word"'` + "\n")
	x.expect("asking\r\n")
	x.types("two\n")
	x.expect("two and password")
	x.expect("ready> ")
	x.types("exit 3\n")
	if code := x.code(); code != 3 {
		t.Errorf("the shell ended with %d", code)
	}
}

// TestStoppedPipeline: Ctrl-Z stops the command too, although the terminal does not talk to it: it must not go on
// alone while nobody renews its lock.
func TestStoppedPipeline(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	x := atTerminal(t, lockFolder(t), "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`"$LOCKER" run --ttl 30s -- sh -c 'echo $$ >` + file + `; while :; do sleep 0.02; done' | cat` + "\n")
	pid := exists(t, file)
	x.types("\x1a")
	stopped(t, pid, true)
	x.expect("ready> ")
	x.types("fg\n")
	stopped(t, pid, false)
	x.types("\x03")
	dead(t, pid)
	x.expect("ready> ")
}

// TestBackground: a command in the background that wants the terminal is stopped like any other job, and fg helps.
func TestBackground(t *testing.T) {
	t.Parallel()
	x := atTerminal(t, lockFolder(t), "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`"$LOCKER" run --ttl 30s -- sh -c 'read line; echo "got $line"' &` + "\n")
	x.expect("ready> ")
	eventually(t, "the shell says that it is stopped", func() bool {
		x.types("jobs\n")
		x.expect("ready> ")
		x.mu.Lock()
		defer x.mu.Unlock()
		return strings.Contains(x.shown.String(), "Stopped")
	})
	x.types("fg\n")
	time.Sleep(100 * time.Millisecond) // what is typed before goes to the command as well
	x.types("one\n")
	x.expect("got one")
	x.expect("ready> ")
}

// TestNobodyToContinue: without a shell that could continue it, a Ctrl-Z stops nothing for ever.
func TestNobodyToContinue(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{program, "run", "--", "cat"}, {"/bin/sh", "-c", `"$LOCKER" run -- cat; :`}} {
		x := atTerminal(t, lockFolder(t), args[0], args[1:]...)
		x.types("one\n")
		x.expect("one\r\none\r\n")
		x.types("\x1a")
		x.expect("^Z")
		x.types("two\n")
		x.expect("two\r\ntwo\r\n")
		x.types("\x04")
		if code := x.code(); code != 0 {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}

// TestInterruptedScript: a Ctrl-C ends the script too that waits for the command.
func TestInterruptedScript(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	x := atTerminal(t, locks, "/bin/sh", "-i")
	x.expect("ready> ")
	x.types(`sh -c '"$LOCKER" run -- sh -c "echo be; exec sleep 100"; echo went on'` + "\n")
	x.expect("be\r\n")
	x.types("\x03")
	x.expect("ready> ")
	x.types("echo code $?\n")
	x.expect("code 130")
	x.mu.Lock()
	defer x.mu.Unlock()
	if strings.Contains(x.shown.String(), "\nwent on") {
		t.Errorf("the script went on: %q", x.shown.String())
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// TestHarmlessSignalsWhileWaiting: a window that changes its size, and a Ctrl-Z with a fg, do not end the wait.
func TestHarmlessSignalsWhileWaiting(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "begun")
	holder := start(t, locks, "run", "--key", "job", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 100`, file)
	exists(t, file)
	waiter := start(t, locks, "run", "--key", "job", "--", "echo", "my turn")
	eventually(t, "it waits", func() bool {
		return strings.Contains(run(t, locks, "show", "--json", "job").out.String(), `"waiters": 1`)
	})
	for _, s := range []syscall.Signal{unix.SIGWINCH, unix.SIGPIPE, unix.SIGCONT} {
		signalTo(t, waiter.Process.Pid, s)
	}
	time.Sleep(50 * time.Millisecond)
	signalTo(t, holder.Process.Pid, syscall.SIGTERM)
	waiter.ends(0, "my turn")
}

// TestStoppedByHand: a SIGTSTP stops locker and its command; a SIGCONT continues both.
func TestStoppedByHand(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	s := prepare(t, lockFolder(t), "run", "--ttl", "30s", "--", "sh", "-c", `trap "exit 4" TERM; echo $$ >"$0"; while :; do sleep 0.02; done`, file)
	s.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a shell starts it
	s.begin()
	pid, own := exists(t, file), strconv.Itoa(s.Process.Pid)
	signalTo(t, s.Process.Pid, unix.SIGTSTP)
	stopped(t, pid, true)
	stopped(t, own, true)
	signalTo(t, s.Process.Pid, unix.SIGCONT)
	stopped(t, pid, false)
	signalTo(t, s.Process.Pid, unix.SIGTERM)
	s.ends(4, "")
}

// TestOrphans: as the first process of a container, locker buries what the command leaves behind.
func TestOrphans(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	s := prepare(t, lockFolder(t), "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", program, "run", "--", "sh", "-c",
		`(sleep 0.1 & sleep 0.1 &); sleep 1; grep -l "^State:.*Z" /proc/[0-9]*/status | wc -l; echo $$ >"$0/done"`, folder)
	path, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("there is no unshare to make a container with")
	}
	s.Path, s.Args[0] = path, path
	s.begin()
	if s.code(); strings.Contains(s.err.String(), "unshare") {
		t.Skipf("no container can be made here: %s", s.err.String())
	}
	s.ends(0, "0\n")
}

// TestRenewedAfterAll: what got SIGTERM because renewals failed does not go on when one gets through after all.
func TestRenewedAfterAll(t *testing.T) {
	t.Parallel()
	const ttl, grace = 3 * time.Second, time.Second
	locks, work := lockFolder(t), t.TempDir()
	begun, asked := filepath.Join(work, "begun"), filepath.Join(work, "asked")
	s := start(t, locks, "run", "--key", "job", "--ttl", ttl.String(), "--grace", grace.String(), "--", "sh", "-c",
		`trap 'echo 1 >"$1"' TERM; echo $$ >"$0"; while :; do sleep 0.02; done`, begun, asked)
	pid := exists(t, begun)
	thaw := freeze(t, locks)
	exists(t, asked)
	thaw()
	began := time.Now()
	dead(t, pid)
	if took := time.Since(began); took > grace+2*time.Second {
		t.Errorf("it went on for %v, with a grace of %v", took, grace)
	}
	s.ends(76, "was lost: expiring")
}
