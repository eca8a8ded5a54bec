package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fec20105/locker/internal/servertest"
)

// asProgram makes this test program the program itself.
const asProgram = "LOCKER_TORTURE_PROGRAM"

func TestMain(m *testing.M) {
	if runtime.GOOS != "linux" {
		fmt.Println("skipped: torture needs Linux")
		os.Exit(0)
	}
	if os.Getenv(asProgram) != "" || os.Getenv(workerJob) != "" {
		main()
	}
	os.Exit(m.Run())
}

// TestBroken: what a run finds wrong with lockers that are broken on purpose.
func TestBroken(t *testing.T) {
	kinds := map[string][]string{
		"double":  {"overlap", "token", "guard"}, // the other key has tokens of its own
		"overdue": {"overlap"},
		"token":   {"token"},
		"kept":    {"progress"},
	}
	for name := range broken {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := settings{Time: time.Minute, TTL: 300 * time.Millisecond, Seed: 1, Processes: 4, Keys: 2, Broken: name, Out: t.TempDir()}
			r, err := one(t.Context(), s, starter{"file", startFile})
			v, ok := errors.AsType[*violation](err)
			if !ok {
				t.Fatalf("not caught within %v: %v", s.Time, err)
			}
			if !slices.Contains(kinds[name], v.Kind) {
				t.Errorf("caught for something else: %v", v)
			}
			var out bytes.Buffer
			if code := report(&out, &out, "file", s, r, err); code != exitViolation {
				t.Errorf("exit code %d", code)
			}
			for _, want := range []string{"BROKEN (seed 1): " + v.Kind, "again:   go run ./torture -backend file -broken " + name, " worker "} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the report does not say %q:\n%s", want, &out)
				}
			}
			page, err := os.ReadFile(filepath.Join(s.Out, "file.html"))
			if err != nil || !bytes.Contains(page, []byte("<rect ")) || v.Kind == "overlap" && !bytes.Contains(page, []byte("guilty")) {
				t.Errorf("the picture: %v\n%s", err, page)
			}
		})
	}
}

// TestRedis: the real thing bears it.
func TestRedis(t *testing.T) {
	t.Parallel()
	s := settings{Time: 8 * time.Second, TTL: 500 * time.Millisecond, Seed: 1, Processes: 4, Keys: 2, Out: t.TempDir()}
	r, err := one(t.Context(), s, backends[0])
	if errors.Is(err, servertest.ErrMissing) {
		servertest.Skip(t, "redis", err.Error())
	}
	if err != nil {
		var out bytes.Buffer
		report(&out, &out, "redis", s, r, err)
		t.Fatal(out.String())
	}
	if r.judge.locks < 50 || r.heals < 2 || len(r.faults) < 5 {
		t.Errorf("too little has happened to show anything: %s", r.summary())
	}
	t.Log(r.summary())
}

// TestCommand: what is wrong with a command line or a server is said in clear words, and the exit code tells the sorts apart.
func TestCommand(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"-speed", "9"}, exitUsage, "flag provided but not defined: -speed"},
		{[]string{"redis"}, exitUsage, `"redis" is no flag`},
		{[]string{"-backend", "oracle"}, exitUsage, `-backend "oracle": known are redis,redlock,etcd,postgres,file`},
		{[]string{"-backend", "file", "-broken", "all"}, exitUsage, "known are double, kept, overdue, token"},
		{[]string{"-url", "mem://x"}, exitUsage, "within one process"},
		{[]string{"-url", "file:", "-backend", "file"}, exitUsage, "not both"},
		{[]string{"-ttl", "1ms"}, exitUsage, "between 100ms and 1m"},
		{[]string{"-time", "1s", "-backend", "file"}, exitUnavailable, "leaves none for faults at a TTL of 1s: give "},
		{[]string{"-url", "oracle://x"}, exitUnavailable, `unknown scheme "oracle"`},
		{[]string{"-url", "redis://:secret@127.0.0.1:1"}, exitUnavailable, "connection refused"},
		{[]string{"-help"}, exitOK, "-seed"},
	} {
		var out, errs bytes.Buffer
		if code := command(t.Context(), c.args, &out, &errs); code != c.code || !strings.Contains(errs.String(), c.says) {
			t.Errorf("%q: exit code %d, want %d, and %q in:\n%s", c.args, code, c.code, c.says, &errs)
		}
		if strings.Contains(errs.String(), "secret") {
			t.Errorf("%q: a password is shown:\n%s", c.args, &errs)
		}
	}
}

// TestEnds: a run that is interrupted or killed leaves no process, also none that was stopped.
func TestEnds(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			out := t.TempDir()
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-url", "file://"+t.TempDir(), "-time", "1m", "-out", out)
			cmd.Env = append(os.Environ(), asProgram+"=1")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill() //nolint:errcheck // it may be gone
			var workers []string
			stopped := func(pid string) bool { return stateOf(pid) == "T" }
			await(t, "a stopped worker", func() bool {
				workers = childrenOf(t, cmd.Process.Pid)
				return slices.ContainsFunc(workers, stopped)
			})
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); s == syscall.SIGINT && code != exitInterrupted {
				t.Errorf("exit code %d", code)
			}
			await(t, "the end of the workers", func() bool {
				return !slices.ContainsFunc(workers, func(pid string) bool { return stateOf(pid) != "" })
			})
		})
	}
}

func await(t *testing.T, what string, seen func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !seen(); pause(t.Context(), time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 20 s for %s", what)
		}
	}
}

// stateOf is the state of a process, or "" if it is gone.
func stateOf(pid string) string {
	state, _ := statOf(pid)
	return state
}

func statOf(pid string) (state, parent string) {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	_, rest, ok := strings.Cut(string(stat), ") ")
	if fields := strings.Fields(rest); err == nil && ok && len(fields) > 1 {
		return fields[0], fields[1]
	}
	return "", ""
}

func childrenOf(t *testing.T, pid int) (children []string) {
	t.Helper()
	processes, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if _, parent := statOf(p.Name()); parent == fmt.Sprint(pid) {
			children = append(children, p.Name())
		}
	}
	return children
}
