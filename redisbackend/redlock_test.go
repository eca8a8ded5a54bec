package redisbackend_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

// redlock opens a Redlock on servers that have been in use for long.
func redlock(t testing.TB, group *servertest.RedisGroup, params string) locker.Locker {
	t.Helper()
	redistest.Remember(t, group, redisbackend.DefaultPrefix)
	return openRedlock(t, group.URL+"?"+params)
}

func openRedlock(t testing.TB, rawURL string) locker.Locker {
	t.Helper()
	l, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

func TestRedlockRefusesWrongServers(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 3)
	addr := func(i int) string { return group.Members[i].Addr }
	replica := start(t, "--replicaof", strings.ReplaceAll(addr(0), ":", " "))
	_, port, _ := strings.Cut(addr(0), ":")
	for name, c := range map[string]struct{ url, want string }{
		"one":                 {"redlock://h1", "write redis:// for it, or name 3, 5 or 7"},
		"none":                {"redlock://", "names no servers"},
		"two":                 {"redlock://h1,h2", "2 servers tolerate no more failures than 1 do: name 3, 5 or 7"},
		"four":                {"redlock://h1,h2,h3,h4", "4 servers tolerate no more failures than 3 do: name 3, 5 or 7"},
		"nine":                {"redlock://a,b,c,d,e,f,g,h,i", "name 3, 5 or 7"},
		"twice":               {"redlock://h1,h2:6379,h2", "the server h2:6379 is named twice"},
		"the same, otherwise": {"redlock://" + addr(0) + "," + addr(1) + ",localhost:" + port, "two addresses lead to the same server"},
		"a replica":           {"redlock://" + addr(0) + "," + addr(1) + "," + replica.Addr, "read-only replica"},
		"a scheme within":     {"redlock://h1,rediss://h2,h3", "all servers have the first one, redlock://h1,h2,h3"},
		"ca without TLS":      {"redlock://h1,h2,h3?ca=x", "write redlocks://"},
		"no majority":         {"redlock://" + addr(0) + ",127.0.0.1:1,127.0.0.1:2", "1 of 3 servers can be reached, and 2 are needed"},
		"short quarantine":    {"redlock://h1,h2,h3?quarantine=10ms", "too short"},
		"bad parameter":       {"redlock://h1,h2,h3?durable=perhaps", "must be true or false"},
		"unknown parameter":   {"redlock://u:secret@h1,h2,h3?replicas=2", "known are ca, db, dial_timeout, durable, pool_size, prefix, quarantine"},
		"bad path":            {"redlock://h1,h2,h3/x", "write redlock://host:6379/0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := locker.OpenLocker(t.Context(), c.url, locker.Config{})
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestRedlockOfClients(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 3)
	redistest.Remember(t, group, "mine:")
	var clients []*redis.Client
	for _, m := range group.Members {
		clients = append(clients, direct(t, m))
	}
	if _, err := redisbackend.NewRedlock(t.Context(), []*redis.Client{clients[0], nil, clients[2]}, redisbackend.RedlockOptions{}); err == nil || !strings.Contains(err.Error(), "client 2 is nil") {
		t.Errorf("a nil client: %v", err)
	}
	l, err := redisbackend.NewRedlock(t.Context(), clients, redisbackend.RedlockOptions{Prefix: "mine:"})
	if err != nil {
		t.Fatal(err)
	}
	lease := acquire(t, l, try("k"))
	if n, err := clients[1].Exists(t.Context(), "mine:{k}").Result(); n != 1 || err != nil {
		t.Errorf("the vote of server 1: %d, %v", n, err)
	}
	release(t, l, lease)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := clients[0].Ping(t.Context()).Err(); err != nil {
		t.Errorf("the caller's client after Close: %v", err)
	}
}

// Servers that are used for the first time may have lost what they knew: they stay out of votes at first.
func TestRedlockQuarantine(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 3)
	l := openRedlock(t, group.URL+"?quarantine=2s")
	began := time.Now()
	if _, err := l.Acquire(t.Context(), try("k")); err == nil || errors.Is(err, locker.ErrHeld) || !strings.Contains(err.Error(), "grant nothing for another") {
		t.Errorf("an acquire in the quarantine: %v", err)
	}
	lease := acquire(t, l, request("k"))
	if waited := time.Since(began); waited < 1800*time.Millisecond || waited > 4*time.Second {
		t.Errorf("granted after %v, want 2 s", waited)
	}

	// A minority without memory does not vote: the lock is held by the other two still.
	if err := group.Members[0].Wipe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := group.Members[1].Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := openRedlock(t, group.URL+"?quarantine=2s")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := other.Acquire(ctx, try("new")); err == nil {
		t.Error("granted by one server, one without memory, and one that hangs")
	}
	if err := group.Members[1].Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("an acquire of a held key: %v", err)
	}
	release(t, l, lease)

	// All of them are emptied while they run.
	for _, m := range group.Members {
		if err := direct(t, m).FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Acquire(t.Context(), try("k")); err == nil || errors.Is(err, locker.ErrHeld) {
		t.Errorf("an acquire from servers without memory: %v", err)
	}
	if next := acquire(t, l, request("k")); next.Token <= lease.Token {
		t.Errorf("token %d after %d", next.Token, lease.Token)
	}
}

// A restart is a loss of memory, unless the servers are durable.
func TestRedlockRestart(t *testing.T) {
	t.Parallel()
	for _, durable := range []bool{false, true} {
		t.Run(fmt.Sprint("durable ", durable), func(t *testing.T) {
			t.Parallel()
			group := servertest.RedisServers(t, 3)
			l := redlock(t, group, fmt.Sprint("quarantine=30s&durable=", durable))
			lease := acquire(t, l, try("k"))
			if err := group.Each(func(s *servertest.Server) error { return s.Crash(t.Context()) }); err != nil {
				t.Fatal(err)
			}
			// What it still knows it keeps in either case.
			eventually(t, "the lock is extended", func() bool { _, err := l.Extend(t.Context(), lease); return err == nil })
			_, err := l.Acquire(t.Context(), try("new"))
			if granted := err == nil; granted != durable {
				t.Errorf("an acquire after a restart: %v", err)
			}
			if early := l.Capabilities().EarlyFree; (early == 0) != durable {
				t.Errorf("EarlyFree is %v", early)
			}
		})
	}
}

// An Extend tells the lock to servers that were down, and never more than that.
func TestRedlockRepairs(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 5)
	l := redlock(t, group, "durable=true")
	down := group.Members[3:]
	for _, m := range down {
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	lease := acquire(t, l, try("k"))
	for _, m := range down {
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var servers []*redis.Client
	for _, m := range group.Members {
		servers = append(servers, direct(t, m))
	}
	votes := func() (n int) {
		for _, s := range servers {
			if s.GetRange(t.Context(), "locker:{k}", 67, 67+int64(len(lease.ID))-1).Val() == lease.ID {
				n++
			}
		}
		return n
	}
	if n := votes(); n != 3 {
		t.Fatalf("%d servers have voted, want 3", n)
	}
	eventually(t, "all servers know the lock", func() bool {
		if _, err := l.Extend(t.Context(), lease); err != nil {
			t.Fatalf("extend: %v", err)
		}
		return votes() == 5
	})

	for _, s := range servers[:3] {
		if err := s.Del(t.Context(), "locker:{k}").Err(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("extend of a lock that most servers have forgotten: %v", err)
	}
	if n := votes(); n != 2 {
		t.Errorf("%d servers know the lock after that, want 2", n)
	}
}

// A minority that hangs costs no call any time.
func TestRedlockHungMinority(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 5)
	l := redlock(t, group, "durable=true")
	other := openRedlock(t, group.URL+"?durable=true")
	for _, m := range group.Members[:2] {
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	const most = 250 * time.Millisecond // the time for stragglers, and some for this machine
	within := func(what string, call func()) {
		t.Helper()
		began := time.Now()
		if call(); time.Since(began) > most {
			t.Errorf("%s took %v, want %v at most", what, time.Since(began), most)
		}
	}
	for i := range 20 {
		key := fmt.Sprint(i)
		var lease locker.Lease
		within("acquire", func() { lease = acquire(t, l, try(key)) })
		within("extend", func() {
			if _, err := l.Extend(t.Context(), lease); err != nil {
				t.Errorf("extend: %v", err)
			}
		})
		within("a refusal", func() {
			if _, err := other.Acquire(t.Context(), try(key)); !errors.Is(err, locker.ErrHeld) {
				t.Errorf("acquire of a held key: %v", err)
			}
		})
		within("release", func() { release(t, l, lease) })
	}
}

// Tokens grow when servers have seen different ones.
func TestRedlockTokensAreWrittenBack(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 5)
	l := redlock(t, group, "durable=true")
	ahead := uint64(time.Now().Add(time.Hour).UnixMicro())
	for i, m := range group.Members {
		state := fmt.Sprintf("%016d %016d %016d %010d 0000 \x7f - ", ahead+uint64(100*i), 0, 0, 0)
		if err := direct(t, m).Set(t.Context(), "locker:{k}", state, time.Hour).Err(); err != nil {
			t.Fatal(err)
		}
	}
	// Servers 0 and 1 are not asked: the token of the others must be greater than theirs.
	for _, m := range group.Members[:2] {
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	lease := acquire(t, l, try("k"))
	if lease.Token != ahead+401 {
		t.Errorf("token %d, want the greatest of the votes, %d", lease.Token, ahead+401)
	}
	for _, m := range group.Members[2:] {
		if token := direct(t, m).GetRange(t.Context(), "locker:{k}", 0, 15).Val(); token != fmt.Sprintf("%016d", lease.Token) {
			t.Errorf("server %s has token %s, want %d", m.Addr, token, lease.Token)
		}
	}
	release(t, l, lease)
	if next := acquire(t, l, try("k")); next.Token <= lease.Token {
		t.Errorf("token %d after %d", next.Token, lease.Token)
	}
}

func TestRedlockForget(t *testing.T) {
	t.Parallel()
	group := servertest.RedisServers(t, 3)
	l := redlock(t, group, "durable=true")
	forget := func() error { return l.(*redisbackend.Redlock).Forget(t.Context(), "k") }
	req := try("k")
	lease := acquire(t, l, req)
	if err := forget(); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("forgetting a held key: %v, want ErrHeld", err)
	}
	release(t, l, lease)
	if err := forget(); err != nil {
		t.Fatal(err)
	}
	known := 0
	for _, m := range group.Members {
		if direct(t, m).PTTL(t.Context(), "locker:{k}").Val() > 15*time.Second {
			known++
		}
	}
	if known > 1 { // one may have been busy
		t.Errorf("%d of 3 servers know the key after Forget", known)
	}
	if late, err := l.Acquire(t.Context(), req); err == nil {
		t.Errorf("a late copy of the last request is granted after Forget: %+v", late)
	}
	if next := acquire(t, l, try("k")); next.Token <= lease.Token {
		t.Errorf("token %d follows %d after Forget", next.Token, lease.Token)
	}
}
