//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write docs/command.md anew")

// program is the built command, which all tests run.
var program string

func TestMain(m *testing.M) {
	folder, err := os.MkdirTemp("", "locker-command-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(folder, "locker")
	code := 1
	if err := build(program); err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	_ = os.RemoveAll(folder)
	os.Exit(code)
}

// build builds the command as docs/command.md says: without cgo, as one static program.
func build(path string, flags ...string) error {
	args := append([]string{"build", "-buildvcs=false", "-o", path}, append(flags, ".")...)
	cmd := exec.CommandContext(context.Background(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// started is a command that runs.
type started struct {
	*exec.Cmd
	t        *testing.T
	out, err bytes.Buffer
	done     chan struct{}
}

// start starts locker on a folder of its own or a given one, through LOCKER_URL.
func start(t *testing.T, folder string, args ...string) *started {
	t.Helper()
	s := prepare(t, folder, args...)
	s.begin()
	return s
}

func prepare(t *testing.T, folder string, args ...string) *started {
	s := &started{Cmd: exec.CommandContext(t.Context(), program, args...), t: t, done: make(chan struct{})}
	s.Env = append(os.Environ(), "LOCKER_URL=file://"+folder, "NO_COLOR=1")
	s.Stdout, s.Stderr = &s.out, &s.err
	s.WaitDelay = 10 * time.Second
	return s
}

func (s *started) begin() {
	s.t.Helper()
	if err := s.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		defer close(s.done)
		_ = s.Wait()
	}()
	s.t.Cleanup(func() {
		_ = s.Process.Kill()
		<-s.done
	})
}

// code waits for the end.
func (s *started) code() int {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(30 * time.Second):
		s.t.Fatalf("%v runs still; it said %q and %q", s.Args, s.out.String(), s.err.String())
	}
	return s.ProcessState.ExitCode()
}

// ends fails the test if the command does not end with that code, or does not say what is wanted.
func (s *started) ends(code int, says string) {
	s.t.Helper()
	if got := s.code(); got != code || !strings.Contains(s.out.String()+s.err.String(), says) {
		s.t.Errorf("%q ended with %d and said %q and %q; want %d and %q", s.Args[1:], got, s.out.String(), s.err.String(), code, says)
	}
}

func run(t *testing.T, folder string, args ...string) *started {
	t.Helper()
	s := start(t, folder, args...)
	s.code()
	return s
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for over := time.Now().Add(20 * time.Second); !cond(); time.Sleep(3 * time.Millisecond) {
		if time.Now().After(over) {
			t.Fatalf("still not true: %s", what)
		}
	}
}

// exists waits for a file that a command makes, and returns what is in it.
func exists(t *testing.T, path string) string {
	t.Helper()
	var text []byte
	eventually(t, "there is "+filepath.Base(path), func() bool {
		var err error
		text, err = os.ReadFile(path)
		return err == nil && bytes.HasSuffix(text, []byte("\n"))
	})
	return strings.TrimSpace(string(text))
}

// dead waits for the end of a process.
func dead(t *testing.T, pid string) {
	t.Helper()
	eventually(t, "process "+pid+" is dead", func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err != nil || bytes.Contains(stat, []byte(") Z "))
	})
}

// left are the states and mailboxes in a folder of locks.
func left(t *testing.T, folder string) (files []string) {
	t.Helper()
	for _, pattern := range []string{"k-*", "m-*"} {
		found, err := filepath.Glob(filepath.Join(folder, "locker-boot-*", pattern))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	return files
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	locks := lockFolder(t)
	noBit := filepath.Join(base, "no-bit")
	noFormat := filepath.Join(base, "no-format")
	for path, mode := range map[string]os.FileMode{noBit: 0o644, noFormat: 0o755} {
		if err := os.WriteFile(path, []byte("\x00\x01\x02"), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"", 64, "Usage:"},
		{"rum", 64, `no command "rum"`},
		{"run", 64, "there is no command"},
		{"run --", 64, "there is no command"},
		{"run --foo -- true", 64, "unknown flag --foo"},
		{"run --ttl 0 -- true", 64, "--ttl"},
		{"run --ttl x -- true", 64, "--ttl"},
		{"run --ttl 1ms -- true", 64, "--ttl 1ms: a TTL is between"},
		{"run --wait 1s --no-wait -- true", 64, "contradict"},
		{"run --wait -1s -- true", 64, "--wait"},
		{"run --max-hold 0 -- true", 64, "--max-hold"},
		{"run --grace 14s -- true", 64, "--grace"},
		{"run --key= -- true", 64, "--key"},
		{"run --url fil:///x -- true", 64, "unknown scheme"},
		{"run --url file://tmp/x -- true", 64, "three slashes"},
		{"run --url file:///no/such/folder -- true", 64, "make the folder /no/such first"},
		{"run --url file:///proc/1 -- true", 64, "may write"},
		{"run --url redis://127.0.0.1:1 -- true", 69, "refused"},
		{"run -- no-such-command", 127, "no such command"},
		{"run -- ./no-such-command", 127, "no such command"},
		{"run -- " + noBit, 126, "permission denied"},
		{"run -- " + noFormat, 126, "exec format error"},
		{"show a b", 64, "one key"},
		{"break", 64, "name the key"},
		{"break free", 1, "free is free"},
		{"check --ttl 1ms file:", 64, "--ttl 1ms"},
		{"check redis://127.0.0.1:1", 69, "refused"},
		{"check nonsense", 64, "no scheme"},
		{"run --url mem://x -- true", 64, "exclude no other"},
		{"show --url mem://x", 64, "exclude no other"},
		{"run --url etcd://127.0.0.1:1 -- true", 64, "-tags etcd"},
		{"check etcd://127.0.0.1:1", 64, "-tags etcd"},
		{"bench ETCDS://127.0.0.1:1", 64, "-tags etcd"},
		{"bench --clients 0 file:", 64, "--clients"},
		{"completion tcsh", 64, "bash, zsh or fish"},
		{"help rum", 64, `no command "rum"`},
	} {
		began := time.Now()
		run(t, locks, strings.Fields(c.args)...).ends(c.code, c.says)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%q took %v", c.args, took)
		}
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
	if _, err := os.Stat("/no"); !errors.Is(err, os.ErrNotExist) {
		t.Error("a folder was made for a mistyped URL")
	}
}

// TestDamagedState: exit 64, the file's name and the cure, and the command does not run.
func TestDamagedState(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	ran := filepath.Join(t.TempDir(), "ran")
	holder := start(t, locks, "run", "--key", "job", "--", "sleep", "100")
	var states []string
	eventually(t, "the lock is held", func() bool {
		states, _ = filepath.Glob(filepath.Join(locks, "locker-boot-*", "k-*.json"))
		return len(states) == 1
	})
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-holder.done
	if err := os.WriteFile(states[0], []byte("locker-state 1 0"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"run", "--key", "job", "--", "touch", ran}, {"show"}, {"show", "job"}, {"break", "--yes", "job"}} {
		run(t, locks, args...).ends(64, "then delete the file")
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the command ran although nobody could tell who held the lock")
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	for _, args := range [][]string{{"help"}, {"--help"}} {
		run(t, locks, args...).ends(0, "Exit codes:")
	}
	for _, c := range commands() {
		run(t, locks, c.name, "--help").ends(0, "Examples:")
		run(t, locks, "help", c.name).ends(0, "Usage: locker "+c.name)
	}
	run(t, locks, "--version").ends(0, "locker ")
}

// TestDocument holds docs/command.md to the help texts.
func TestDocument(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "command.md")
	if *update {
		if err := os.WriteFile(path, []byte(document()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || string(text) != document() {
		t.Errorf("docs/command.md differs from the help texts (%v): run make update", err)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	bashPath, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("there is no bash to try its completion script")
	}
	script := filepath.Join(t.TempDir(), "completion")
	if err := os.WriteFile(script, run(t, lockFolder(t), "completion", "bash").out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"locker r":            "run",
		"locker run --max":    "--max-hold",
		"locker completion f": "fish",
		"locker run -- bas":   "bash",
	} {
		words := strings.Fields(line)
		ask := fmt.Sprintf(`. "$0"; COMP_WORDS=(%s); COMP_CWORD=%d; _locker; printf '%%s\n' "${COMPREPLY[@]}"`, line, len(words)-1)
		out, err := exec.CommandContext(t.Context(), bashPath, "-c", ask, script).Output()
		if err != nil || !strings.Contains("\n"+string(out), "\n"+want+"\n") {
			t.Errorf("%q is completed by %q (%v), want %q among them", line, out, err, want)
		}
	}
	for shell, says := range map[string]string{"zsh": "#compdef locker", "fish": "-l max-hold"} {
		run(t, lockFolder(t), "completion", shell).ends(0, says)
	}
}

// TestCompletionZsh types at a real zsh.
func TestCompletionZsh(t *testing.T) {
	t.Parallel()
	zsh, err := exec.LookPath("zsh")
	if err != nil {
		t.Skip("there is no zsh to try its completion script")
	}
	locks, folder := lockFolder(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "_locker"), run(t, locks, "completion", "zsh").out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(folder, "xyzzy")); err != nil { // a command that begins like no other
		t.Fatal(err)
	}
	x := atTerminal(t, locks, zsh, "-f", "-i")
	x.types("PS1='ready> '; fpath=(" + folder + " $fpath); PATH=" + folder + ":" + filepath.Dir(program) + ":$PATH; autoload -Uz compinit; compinit -u -D; echo set''up\n")
	x.expect("setup\r\n")
	for typed, want := range map[string]string{"r": "run", "run --max": "run --max-hold", "completion f": "completion fish", "run -- xyz": "run -- xyzzy"} {
		x.types("locker " + typed + "\t")
		x.expect("locker " + want)
		x.types("\x03")
		x.expect("ready> ")
	}
}

// TestCompletionFish asks a real fish.
func TestCompletionFish(t *testing.T) {
	t.Parallel()
	fish, err := exec.LookPath("fish")
	if err != nil {
		t.Skip("there is no fish to try its completion script")
	}
	script := filepath.Join(t.TempDir(), "locker.fish")
	if err := os.WriteFile(script, run(t, lockFolder(t), "completion", "fish").out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	for typed, want := range map[string]string{"r": "run", "run --max": "--max-hold", "completion f": "fish", "run --key x -- lock": "locker"} {
		cmd := exec.CommandContext(t.Context(), fish, "--no-config", "-c", "source "+script+"; complete -C 'locker "+typed+"'")
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
		out, err := cmd.Output()
		if err != nil || !strings.Contains("\n"+string(out), "\n"+want+"\t") && !strings.Contains("\n"+string(out), "\n"+want+"\n") {
			t.Errorf("%q is completed by %q (%v), want %q among them", typed, out, err, want)
		}
	}
}

// TestSecrets: whatever is wrong with a URL, its password is not said.
func TestSecrets(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	for _, url := range []string{
		"redis://u:hunter2@127.0.0.1:1", "redis://u:hunter2@127.0.0.1:x", "redis://u:hun/ter2@127.0.0.1:1", "rediss://u:hunter2@127.0.0.1:1?foo=hunter2",
		"postgres://u:hunter2@127.0.0.1:1/db", "postgres://u@127.0.0.1:1/db?password=hunter2", "postgres://u:hunter2@127.0.0.1:1/db?sslmode=hunter2",
		"etcd://u:hunter2@127.0.0.1:1", "fil://u:hunter2@x", "hunter2", "u:hunter2@127.0.0.1", "mem://u:hunter2@x", "file://u:hunter2@x/y", "file:///tmp?hunter2=1",
	} {
		for _, args := range [][]string{{"run", "--", "true"}, {"show"}, {"break", "--yes", "x"}, {"check"}, {"bench"}} {
			s := prepare(t, locks, args...)
			s.Env = append(s.Env, "LOCKER_URL="+url)
			s.begin()
			if code := s.code(); code != exitUsage && code != exitUnavailable || strings.Contains(s.out.String()+s.err.String(), "ter2") || s.err.Len() == 0 {
				t.Errorf("%q at %s ended with %d and said %q and %q", args, url, code, s.out.String(), s.err.String())
			}
		}
	}
}

// signalTo sends a signal to a process by its number.
func signalTo(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatalf("%v to %d: %v", s, pid, err)
	}
}

// lockFolder is a folder for locks in memory, where the system has that: on a disk every step waits for the journal, which
// other programs keep busy for up to a second, and the tests would measure those.
func lockFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("/dev/shm", "locker-test-") //nolint:usetesting // that one may be on a disk
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}
