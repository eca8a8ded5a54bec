//go:build linux

package main

import (
	"crypto/rand"
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker/internal/servertest"
)

func TestShow(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	run(t, locks, "show").ends(0, "nobody holds a lock")
	run(t, locks, "show", "--json").ends(0, "[]\n")
	run(t, locks, "show", "job").ends(1, "job is free")
	file := filepath.Join(t.TempDir(), "begun")
	start(t, locks, "run", "--key", "job", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 100`, file)
	exists(t, file)
	start(t, locks, "run", "--key", "a\x1b[31mred", "--", "sleep", "100")
	eventually(t, "both are held", func() bool { return strings.Count(run(t, locks, "show").out.String(), "\n") == 3 })

	table := run(t, locks, "show").out.String()
	want := `(?m)\AKEY +HOLDER +TOKEN +SINCE +UNTIL +WAITERS\na\?\[31mred +.* pid \d+: sleep 100 +\d+ .*\njob +.* pid \d+: sh -c .* \d+ +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +\d\d:\d\d:\d\d \(in 1\d(\.\d)?s\) +0\n\z`
	if !regexp.MustCompile(want).MatchString(table) {
		t.Errorf("the table is\n%s", table)
	}
	var all []shown
	if err := json.Unmarshal(run(t, locks, "show", "--json", "job").out.Bytes(), &all); err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	job := all[0]
	if job.Key != "job" || job.Token == 0 || job.Since == nil || time.Since(*job.Since) > time.Minute || job.Until == nil || time.Until(*job.Until) > 15*time.Second ||
		job.Waiters == nil || *job.Waiters != 0 {
		t.Errorf("as JSON: %+v", job)
	}
}

// TestCheck: the suite passes through the command too, disturbs no other key, and leaves none.
func TestCheck(t *testing.T) {
	locks := lockFolder(t)
	file := filepath.Join(t.TempDir(), "begun")
	neighbour := start(t, locks, "run", "--key", "neighbour", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 300`, file)
	exists(t, file)
	s := prepare(t, locks, "check", "--json", "--ttl", "1s", "--at-once", "16")
	s.Env = append(s.Env, "CI=true") // the command is tested here, not how busy the machine is
	s.begin()
	select {
	case <-s.done:
	case <-time.After(3 * time.Minute):
		t.Fatalf("it runs still: %s", s.out.String())
	}
	lines := strings.Split(strings.TrimSpace(s.out.String()), "\n")
	outcomes := map[string]int{}
	for _, line := range lines[:len(lines)-1] {
		var row struct{ Property, Outcome, Clause, Seen string }
		if err := json.Unmarshal([]byte(line), &row); err != nil || row.Property == "" || row.Clause == "" {
			t.Errorf("%s: %v", line, err)
		}
		if outcomes[row.Outcome]++; row.Outcome == "failed" {
			t.Errorf("%s: %s", row.Property, row.Seen)
		}
	}
	var summary struct {
		Passed, Failed, Skipped int
		Capabilities            struct{ Backend, Fencing string }
	}
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &summary); err != nil {
		t.Fatal(err)
	}
	if summary.Passed != outcomes["passed"] || summary.Passed < 50 || summary.Failed != outcomes["failed"] || summary.Capabilities.Backend != "file" || summary.Capabilities.Fencing != "crash" {
		t.Errorf("the summary says %+v; counted %v", summary, outcomes)
	}
	if code := s.ProcessState.ExitCode(); code != 0 && summary.Failed == 0 || s.err.Len() > 0 {
		t.Errorf("exit code %d, and it said %q", code, s.err.String())
	}
	eventually(t, "nothing is held but the neighbour's lock", func() bool {
		var all []shown
		_ = json.Unmarshal(run(t, locks, "show", "--json").out.Bytes(), &all)
		return len(all) == 1 && all[0].Key == "neighbour"
	})
	select {
	case <-neighbour.done:
		t.Errorf("the neighbour was disturbed: %s", neighbour.err.String())
	default:
	}
}

// TestServers: the commands work on every backend that there is.
func TestServers(t *testing.T) {
	t.Parallel()
	withEtcd := filepath.Join(t.TempDir(), "locker")
	servers := map[string]func(t *testing.T) (url, path string){
		"redis": func(t *testing.T) (string, string) {
			return servertest.Redis(t, servertest.RedisOptions{}).URL, program
		},
		"postgres": func(t *testing.T) (string, string) {
			return servertest.Postgres(t, servertest.PostgresOptions{}).URL, program
		},
		"etcd": func(t *testing.T) (string, string) {
			server := servertest.Etcd(t, servertest.EtcdOptions{})
			if err := build(withEtcd, "-tags", "etcd"); err != nil {
				t.Fatal(err)
			}
			return server.URL, withEtcd
		},
	}
	for name, server := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, path := server(t)
			at := func(args ...string) *started {
				s := prepare(t, "/unused", args...)
				s.Path, s.Env = path, append(s.Env, "LOCKER_URL="+url)
				s.begin()
				return s
			}
			key := "command-" + rand.Text()
			file := filepath.Join(t.TempDir(), "begun")
			holder := at("run", "--key", key, "--ttl", "4s", "--grace", "500ms", "--", "sh", "-c", `echo 1 >"$0"; exec sleep 100`, file)
			exists(t, file)
			at("run", "--key", key, "--no-wait", "--", "true").ends(75, "is held by")
			show := at("show", "--json", key)
			show.ends(0, key)
			var all []shown
			if err := json.Unmarshal(show.out.Bytes(), &all); err != nil || len(all) != 1 || all[0].Token == 0 {
				t.Errorf("show --json: %v, %s", err, show.out.String())
			}
			at("break", "--yes", key).ends(0, "taken away: "+key)
			holder.ends(76, "was lost")
			at("run", "--key", key, "--", "sh", "-c", `test "$LOCKER_TOKEN" -gt 0`).ends(0, "")
			at("show", key).ends(1, key+" is free")
			at("bench", "--duration", "200ms", "--clients", "3").ends(0, "handover")
		})
	}
}

// TestCheckOnServers: the connections of a PostgreSQL server with its default settings are enough, and Redis knows nothing of
// the check soon after.
func TestCheckOnServers(t *testing.T) {
	check := func(t *testing.T, url string) {
		t.Parallel()
		s := prepare(t, "/unused", "check", "--ttl", "500ms", url)
		s.Env = append(s.Env, "CI=true")
		s.begin()
		select {
		case <-s.done:
		case <-time.After(3 * time.Minute):
		}
		s.ends(0, ` 0 failed, `)
	}
	t.Run("postgres", func(t *testing.T) {
		check(t, servertest.Postgres(t, servertest.PostgresOptions{Private: true, Args: []string{"-c", "max_connections=100"}}).URL)
	})
	t.Run("redis", func(t *testing.T) {
		server := servertest.Redis(t, servertest.RedisOptions{Private: true})
		check(t, server.URL)
		client := redis.NewClient(&redis.Options{Addr: server.Addr})
		defer client.Close()
		keys, err := client.Keys(t.Context(), "*").Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range keys {
			if left := client.PTTL(t.Context(), key).Val(); left > 15*time.Second || left == -1 {
				t.Errorf("%q stays for %v", key, left)
			}
		}
	})
}

// TestCheckInterrupted: a Ctrl-C ends check soon, and it leaves no lock.
func TestCheckInterrupted(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	for _, args := range [][]string{{"check", "--ttl", "1s", "--at-once", "16"}, {"bench", "--duration", "2s"}} {
		s := start(t, locks, args...)
		eventually(t, "it works", func() bool { return strings.Contains(run(t, locks, "show").out.String(), "KEY") })
		began := time.Now()
		signalTo(t, s.Process.Pid, syscall.SIGINT)
		s.ends(130, "")
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("%q ended after %v", args, took)
		}
		if strings.Contains(s.out.String(), "FAILED") {
			t.Errorf("%q said %s", args, s.out.String())
		}
		run(t, locks, "show").ends(0, "nobody holds a lock")
	}
}

// TestCheckMemory: also the backend of tests can be checked.
func TestCheckMemory(t *testing.T) {
	s := start(t, lockFolder(t), "check", "--ttl", "500ms", "--at-once", "16", "mem://x")
	s.ends(0, ` 0 failed, `)
}

func TestBench(t *testing.T) {
	t.Parallel()
	locks := lockFolder(t)
	s := run(t, locks, "bench", "--duration", "100ms", "--clients", "3")
	s.ends(0, "")
	for _, line := range []string{"round trip", "uncontended", "contended", "handover", "held"} {
		if !regexp.MustCompile(`(?m)^ *` + line + ` +[\d.]+[µm]?s +[\d.]+[µm]?s +\d+$`).MatchString(s.out.String()) {
			t.Errorf("there is no line %q in\n%s", line, s.out.String())
		}
	}
	if files := left(t, locks); len(files) > 0 {
		t.Errorf("left behind: %q", files)
	}
}
