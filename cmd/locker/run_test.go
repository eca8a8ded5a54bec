//go:build linux

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRunIsTheCommand(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	run(t, locks, "run", "--", "true").ends(0, "")
	run(t, locks, "run", "sh", "-c", "exit 7").ends(7, "")
	run(t, locks, "run", "--", "sh", "-c", "kill -KILL $$").ends(128+9, "")

	s := prepare(t, locks, "run", "--key", "a key", "--ttl", "20s", "--", "sh", "-c", `cat; echo "$LOCKER_KEY|$LOCKER_TTL|$0" "$@" >&2; echo "$LOCKER_TOKEN"`, "x", "y z", "--")
	s.Stdin = strings.NewReader("what comes in\n")
	s.begin()
	s.code()
	token, found := strings.CutPrefix(s.out.String(), "what comes in\n")
	if n, err := strconv.ParseUint(strings.TrimSpace(token), 10, 64); !found || err != nil || n == 0 {
		t.Errorf("standard output: %q", s.out.String())
	}
	if got, want := s.err.String(), "a key|20s|x y z --\n"; got != want {
		t.Errorf("standard error: %q, want %q", got, want)
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// TestNeverBoth: one lock, a job that takes longer than its TTL, and others that want the lock too.
func TestNeverBoth(t *testing.T) {
	t.Parallel()
	locks, work := lockFolder(t), t.TempDir()
	job := start(t, locks, "run", "--key", "job", "--ttl", "500ms", "--", "sh", "-c", `echo 1 >"$0/begun"; sleep 2; echo 1 >"$0/over"`, work)
	exists(t, filepath.Join(work, "begun"))
	for range 10 {
		other := run(t, locks, "run", "--key", "job", "--no-wait", "--", "touch", filepath.Join(work, "both"))
		if _, err := os.Stat(filepath.Join(work, "over")); err == nil {
			break
		}
		other.ends(75, fmt.Sprintf("pid %d: sh -c", job.Process.Pid))
	}
	run(t, locks, "run", "--key", "job", "--wait", "100ms", "--", "touch", filepath.Join(work, "both")).ends(75, "is held by")
	waiter := start(t, locks, "run", "--key", "job", "--wait", "20s", "--", "cat", filepath.Join(work, "over"))
	job.ends(0, "")
	waiter.ends(0, "1\n")
	if _, err := os.Stat(filepath.Join(work, "both")); err == nil {
		t.Error("two had the lock")
	}
}

// TestContenders: a counter that nothing but the lock protects.
func TestContenders(t *testing.T) {
	t.Parallel()
	const contenders = 100
	locks := lockFolder(t)
	counter := filepath.Join(t.TempDir(), "counter")
	if err := os.WriteFile(counter, []byte("0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all := make([]*started, contenders)
	for i := range all {
		all[i] = start(t, locks, "run", "--key", "counter", "--", "sh", "-c", `read n <"$0"; echo $((n+1)) >"$0"`, counter)
	}
	for _, s := range all {
		s.ends(0, "")
	}
	if got := exists(t, counter); got != strconv.Itoa(contenders) {
		t.Errorf("%d contenders have counted to %s", contenders, got)
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// family is a command that ignores SIGTERM, has a child that does too, and writes both numbers into the file $0.
const family = `trap "" TERM; sleep 100 & echo $$ $! >"$0"; wait; sleep 100`

// TestTakenAway: SIGTERM at once, SIGKILL after the grace, to the whole group; then the compensation, once.
func TestTakenAway(t *testing.T) {
	t.Parallel()
	locks, work := lockFolder(t), t.TempDir()
	file, undone := filepath.Join(work, "pids"), filepath.Join(work, "undone")
	undo := `echo "$LOCKER_KEY $LOCKER_TOKEN $LOCKER_REASON" >>` + undone

	obedient := start(t, locks, "run", "--key", "job", "--grace", "5s", "--on-lost", undo, "--", "sh", "-c", `trap "exit 3" TERM; echo $$ >"$0"; sleep 100 & wait`, file)
	exists(t, file)
	began := time.Now()
	run(t, locks, "break", "--yes", "job").ends(0, "taken away: job (held by ")
	obedient.ends(76, "was lost: taken")
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("a command that ends at SIGTERM ended after %v", took)
	}
	if got := strings.Fields(exists(t, undone)); len(got) != 3 || got[0] != "job" || got[2] != "taken" {
		t.Errorf("--on-lost saw %q", got)
	}

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	stubborn := start(t, locks, "run", "--key", "job", "--grace", "500ms", "--", "sh", "-c", family, file)
	pids := strings.Fields(exists(t, file))
	began = time.Now()
	run(t, locks, "break", "--yes", "job")
	stubborn.ends(76, "was lost: taken")
	if took := time.Since(began); took < 500*time.Millisecond || took > 5*time.Second {
		t.Errorf("a command that ignores SIGTERM ended after %v, with a grace of 500ms", took)
	}
	for _, pid := range pids {
		dead(t, pid)
	}
}

// freeze makes every step of a folder hang, so that renewals fail, until the function that it returns is called.
func freeze(t *testing.T, locks string) (thaw func()) {
	t.Helper()
	var taken []*os.File
	files, err := filepath.Glob(filepath.Join(locks, "locker-boot-*", "*.lock"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, path := range files {
		file, err := os.Open(path)
		if err == nil {
			err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, file)
	}
	thaw = sync.OnceFunc(func() {
		for _, file := range taken {
			_ = file.Close()
		}
	})
	t.Cleanup(thaw)
	return thaw
}

// TestRenewalsFail: SIGTERM a grace before the deadline, SIGKILL at the deadline.
func TestRenewalsFail(t *testing.T) {
	t.Parallel()
	const ttl, grace = 3 * time.Second, time.Second
	for _, c := range []struct {
		name, script, reason string
		least, most          time.Duration // after the last renewal, which was at most a third of the TTL ago
	}{
		{"obedient", `trap "exit 3" TERM; echo $$ >"$0"; while :; do sleep 0.05; done`, "expiring", ttl - ttl/3 - grace - ttl/100, ttl - grace + 500*time.Millisecond},
		{"stubborn", family, "expired", ttl - ttl/3 - ttl/50, ttl + time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			locks, work := lockFolder(t), t.TempDir()
			file := filepath.Join(work, "pids")
			s := start(t, locks, "run", "--key", "job", "--ttl", ttl.String(), "--grace", grace.String(), "--on-lost", "echo undone: $LOCKER_REASON", "--", "sh", "-c", c.script, file)
			pids := strings.Fields(exists(t, file))
			freeze(t, locks)
			began := time.Now()
			for _, pid := range pids {
				dead(t, pid)
			}
			if took := time.Since(began); took < c.least || took > c.most {
				t.Errorf("the command died %v after the renewals began to fail, want %v to %v", took, c.least, c.most)
			}
			s.ends(76, "undone: "+c.reason)
		})
	}
}

func TestMaxHold(t *testing.T) {
	t.Parallel()
	began := time.Now()
	run(t, lockFolder(t), "run", "--max-hold", "300ms", "--", "sleep", "100").ends(76, "was lost: max hold")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestKilled: with locker die its command and the command's children; the lock is free after the TTL.
func TestKilled(t *testing.T) {
	t.Parallel()
	locks, work := lockFolder(t), t.TempDir()
	file := filepath.Join(work, "pids")
	s := start(t, locks, "run", "--key", "job", "--ttl", "1s", "--", "sh", "-c", family, file)
	pids := strings.Fields(exists(t, file))
	time.Sleep(10 * guardAfter)
	if err := s.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		dead(t, pid)
	}
	run(t, locks, "run", "--key", "job", "--wait", "10s", "--", "true").ends(0, "")
}

// TestKilledYoung: before there is a guard the kernel kills the command.
func TestKilledYoung(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	s := start(t, lockFolder(t), "run", "--", "sh", "-c", `echo $$ >"$0"; exec sleep 100`, file)
	pid := exists(t, file)
	if err := s.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	dead(t, pid)
}

func TestChildKilled(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "pid")
	s := start(t, locks, "run", "--", "sh", "-c", `echo $$ >"$0"; exec sleep 100`, file)
	pid, err := strconv.Atoi(exists(t, file))
	if err != nil {
		t.Fatal(err)
	}
	signalTo(t, pid, syscall.SIGKILL)
	s.ends(128+9, "")
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// TestStoppedGroup: the command is killed while all of its group is stopped. Nothing hangs, and the lock is free.
func TestStoppedGroup(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "pid")
	s := start(t, locks, "run", "--", "sh", "-c", `echo $$ >"$0"; while :; do sleep 0.05; done`, file)
	pid, err := strconv.Atoi(exists(t, file))
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * guardAfter)
	signalTo(t, -pid, syscall.SIGSTOP)
	signalTo(t, pid, syscall.SIGKILL)
	s.ends(128+9, "")
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}

// TestEnvironmentOfNested: a command finds each name once, and its own lock's values, also within another lock. Many programs take
// the first value of a name.
func TestEnvironmentOfNested(t *testing.T) {
	t.Parallel()
	s := prepare(t, lockFolder(t), "run", "--key", "outer", "--", program, "run", "--key", "inner", "--ttl", "7s", "--", "cat", "/proc/self/environ")
	s.Env = append(s.Env, "LOCKER_TOKEN=5", "LOCKER_REASON=old")
	s.begin()
	s.ends(0, "")
	found := make(map[string][]string)
	for _, v := range strings.Split(s.out.String(), "\x00") {
		name, value, _ := strings.Cut(v, "=")
		found[name] = append(found[name], value)
	}
	if !slices.Equal(found["LOCKER_KEY"], []string{"inner"}) || !slices.Equal(found["LOCKER_TTL"], []string{"7s"}) ||
		len(found["LOCKER_TOKEN"]) != 1 || found["LOCKER_TOKEN"][0] == "5" || found["LOCKER_REASON"] != nil {
		t.Errorf("LOCKER_KEY %q, LOCKER_TTL %q, LOCKER_TOKEN %q, LOCKER_REASON %q", found["LOCKER_KEY"], found["LOCKER_TTL"], found["LOCKER_TOKEN"], found["LOCKER_REASON"])
	}
}

// TestNoAnswerIsNotHeld: when the wait is over and nothing could be learned, nobody is said to hold the lock.
func TestNoAnswerIsNotHeld(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	run(t, locks, "run", "--key", "job", "--", "true").ends(0, "")
	stripes, err := filepath.Glob(filepath.Join(locks, "locker-boot-*", "*.lock"))
	if err != nil || len(stripes) == 0 {
		t.Fatal(stripes, err)
	}
	for _, stripe := range stripes {
		file, err := os.Open(stripe)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
	}
	run(t, locks, "run", "--key", "job", "--wait", "300ms", "--", "true").ends(69, "")
}

func TestSignalsArePassedOn(t *testing.T) {
	t.Parallel()
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		file := filepath.Join(t.TempDir(), "pid")
		name := strings.TrimPrefix(unix.SignalName(s), "SIG")
		cmd := start(t, lockFolder(t), "run", "--", "sh", "-c", `trap "exit 5" `+name+`; echo $$ >"$0"; while :; do sleep 0.02; done`, file)
		exists(t, file)
		signalTo(t, cmd.Process.Pid, s)
		cmd.ends(5, "")
	}
}

// TestSignalWhileWaiting ends the wait, and leaves no place in the queue.
func TestSignalWhileWaiting(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "begun")
	holder := start(t, locks, "run", "--key", "job", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 100`, file)
	exists(t, file)
	waiter := start(t, locks, "run", "--key", "job", "--", "true")
	waiting := func(n string) func() bool {
		return func() bool {
			return strings.Contains(run(t, locks, "show", "--json", "job").out.String(), `"waiters": `+n)
		}
	}
	eventually(t, "it waits", waiting("1"))
	signalTo(t, waiter.Process.Pid, syscall.SIGTERM)
	waiter.ends(128+15, "")
	if !waiting("0")() {
		t.Error("its place in the queue is left")
	}
	signalTo(t, holder.Process.Pid, syscall.SIGTERM)
	holder.ends(128+15, "")
}

// TestFullPipe: a command that cannot write keeps its lock, and one that nobody reads from dies as it would alone.
func TestFullPipe(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := prepare(t, locks, "run", "--key", "job", "--ttl", "300ms", "--", "head", "-c", "1000000", "/dev/zero")
	s.Stdout = w
	s.begin()
	_ = w.Close()
	eventually(t, "the lock is held", func() bool { return len(left(t, locks)) > 0 })
	time.Sleep(time.Second)
	run(t, locks, "run", "--key", "job", "--no-wait", "--", "true").ends(75, "is held by")
	if n, err := io.Copy(io.Discard, r); n != 1000000 || err != nil {
		t.Errorf("%d bytes came (%v)", n, err)
	}
	s.ends(0, "")

	r, w, err = os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s = prepare(t, locks, "run", "--", "yes")
	s.Stdout = w
	s.begin()
	_ = w.Close()
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	s.ends(128+13, "")
}

// BenchmarkOverhead compares, in one run, what locker and flock(1) add to a command. What else runs on the machine only ever
// adds time: so the tenth fastest of a hundred is shown beside the median.
func BenchmarkOverhead(b *testing.B) {
	flock, err := exec.LookPath("flock")
	if err != nil {
		b.Skip("there is no flock to compare with")
	}
	locks, file := lockFolder(b), filepath.Join(b.TempDir(), "flock")
	commands := [][]string{{"true"}, {flock, file, "true"}, {program, "run", "--url", "file://" + locks, "--", "true"}}
	var took [3][]time.Duration
	for b.Loop() {
		for i, args := range commands {
			began := time.Now()
			if err := exec.CommandContext(b.Context(), args[0], args[1:]...).Run(); err != nil {
				b.Fatal(err)
			}
			took[i] = append(took[i], time.Since(began))
		}
	}
	at := func(i, percent int) float64 {
		slices.Sort(took[i])
		return float64(took[i][len(took[i])*percent/100]) / float64(time.Millisecond)
	}
	for _, percent := range []int{10, 50} {
		theirs, ours := at(1, percent)-at(0, percent), at(2, percent)-at(0, percent)
		b.ReportMetric(ours, fmt.Sprintf("p%d-ms-over-true", percent))
		b.ReportMetric(ours/theirs, fmt.Sprintf("p%d-×-flock", percent))
	}
	b.ReportMetric(0, "ns/op")
}

// TestIdleWaiting: a waiter costs next to nothing.
func TestIdleWaiting(t *testing.T) {
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "begun")
	start(t, locks, "run", "--key", "job", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 100`, file)
	exists(t, file)
	waiter := start(t, locks, "run", "--key", "job", "--", "true")
	time.Sleep(time.Second) // it has started
	used := func() time.Duration {
		var sum int64
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", waiter.Process.Pid))
		if err != nil || len(tasks) == 0 {
			t.Skipf("this system does not tell the time that processes use (%v)", err)
		}
		for _, task := range tasks {
			text, err := os.ReadFile(task)
			if err != nil {
				t.Fatal(err)
			}
			n, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		return time.Duration(sum)
	}
	before, began := used(), time.Now()
	time.Sleep(5 * time.Second)
	share := float64(used()-before) / float64(time.Since(began))
	t.Logf("a waiter uses %.4f %% of a core", 100*share)
	if share > 0.001 {
		t.Errorf("a waiter uses %.3f %% of a core, want 0.1 %% at most", 100*share)
	}
}

// TestSize: one binary, for hosts where every megabyte is copied.
func TestSize(t *testing.T) {
	info, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the binary has %.1f MB", float64(info.Size())/1e6)
	if info.Size() >= 35e6 {
		t.Errorf("the binary has %d bytes, want less than 35 MB", info.Size())
	}
}

// TestTwoShells: what many at once write into one file is whole.
func TestTwoShells(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	log := filepath.Join(t.TempDir(), "log")
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			for range 10 {
				s := prepare(t, locks, "run", "--key", "job", "--", "sh", "-c", `echo begin $0 >>"$1"; sleep 0.1; echo end $0 >>"$1"`, strconv.Itoa(i), log)
				if err := s.Run(); err != nil {
					t.Errorf("%v: %s", err, s.err.String())
				}
			}
		})
	}
	wg.Wait()
	lines := strings.Split(exists(t, log), "\n")
	if len(lines) != 40 {
		t.Fatalf("%d lines, want 40", len(lines))
	}
	for i := 0; i < len(lines); i += 2 {
		if who, _ := strings.CutPrefix(lines[i], "begin "); lines[i+1] != "end "+who {
			t.Fatalf("both at once: %q, %q", lines[i], lines[i+1])
		}
	}
}

// TestReadme runs the first command of README exactly as it is printed.
func TestReadme(t *testing.T) {
	t.Parallel()
	root := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```sh\n")
	script, _, _ := strings.Cut(rest, "```")
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "LOCKER_URL=")
	out, err := cmd.CombinedOutput()
	for _, want := range []string{"KEY   HOLDER", `"demo" is held by`, "the second try ends with exit code 75"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Fatalf("README's first command shows no %q (%v):\n%s\n%s", want, err, script, out)
		}
	}
}
