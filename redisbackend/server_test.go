package redisbackend_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

// refuses expects that opening the URL fails soon, with words that help, and without a password.
func refuses(t *testing.T, rawURL string, words ...string) {
	t.Helper()
	begun := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	l, err := locker.OpenLocker(ctx, rawURL, locker.Config{})
	if err == nil {
		_ = l.Close()
		t.Errorf("%s was opened", rawURL)
		return
	}
	if took := time.Since(begun); took > 7*time.Second {
		t.Errorf("%s was refused after %v", rawURL, took)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s: the error %q does not say %q", rawURL, err, word)
		}
	}
	if strings.Contains(err.Error(), "s3cret") {
		t.Errorf("the error %q has the password", err)
	}
	if _, ok := errors.AsType[*locker.Error](err); !ok {
		t.Errorf("the error %q is no *locker.Error", err)
	}
}

func TestBadURLs(t *testing.T) {
	t.Parallel()
	for url, word := range map[string]string{
		"redis://127.0.0.1:1?pasword=s3cret":            `a parameter is unknown: known are ca, db, dial_timeout, pool_size, prefix, replicas`,
		"redis://127.0.0.1:1?db=one":                    "db must be a number from 0",
		"redis://127.0.0.1:1?db=-1":                     "db must be a number from 0",
		"redis://127.0.0.1:1?db=1&db=2":                 "db is given 2 times",
		"redis://127.0.0.1:1/2?db=1":                    "twice",
		"redis://127.0.0.1:1/one":                       "number of a database",
		"redis://127.0.0.1:1?pool_size=0":               "pool_size must be a number from 1",
		"redis://127.0.0.1:1?dial_timeout=3":            "dial_timeout must be a duration",
		"redis://127.0.0.1:1?prefix={a}":                "braces",
		"redis://127.0.0.1:1?prefix=a%20b":              "spaces",
		"redis://127.0.0.1:1?ca=x":                      "rediss://",
		"rediss://127.0.0.1:1?ca=/does/not/exist":       "/does/not/exist",
		"redis://user:s3cret@h1:1,h2:2":                 "several hosts",
		"redis+unix://user:s3cret@host/socket":          "names no socket",
		"redis://user:s3cret@127.0.0.1:1":               "connection refused",
		"redis+unix://user:s3cret@/does/not/exist?db=1": "no such file",
	} {
		refuses(t, url, word)
	}
}

func TestWrongServers(t *testing.T) {
	t.Parallel()
	answering := func(reply string) string {
		return fake(t, func(conn net.Conn) {
			lines := bufio.NewReader(conn)
			for {
				if _, err := lines.ReadString('\n'); err != nil {
					return
				}
				if _, err := fmt.Fprint(conn, reply); err != nil || reply == "" {
					return
				}
			}
		})
	}
	refuses(t, "redis://:s3cret@"+answering("HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak the Redis protocol")
	refuses(t, "redis://:s3cret@"+answering("-ERR unknown command\r\n"), "unknown command")
	refuses(t, "redis://:s3cret@"+answering(""), "closed the connection", "rediss://")
	refuses(t, "rediss://:s3cret@"+answering("HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak TLS")
	refuses(t, "redis://:s3cret@"+fake(t, func(conn net.Conn) { _, _ = bufio.NewReader(conn).ReadString(0) }), "did not answer")
	for version, word := range map[string]string{"6.0.16": "the oldest that works is 6.2", "5.0": "the oldest that works is 6.2"} {
		refuses(t, "redis://"+oldRedis(t, version), version, word)
	}
	for _, version := range []string{"6.2.0", "7.2.4", "10.0.0", "unstable"} {
		open(t, "redis://"+oldRedis(t, version))
	}
}

// fake is a server that serves each connection with a function.
func fake(t *testing.T, serve func(net.Conn)) (addr string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return listener.Addr().String()
}

// oldRedis knows PING and INFO.
func oldRedis(t *testing.T, version string) (addr string) {
	t.Helper()
	return fake(t, func(conn net.Conn) {
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			var reply string
			switch strings.ToLower(lines.Text()) {
			case "hello", "client":
				reply = "-ERR unknown command\r\n"
			case "ping":
				reply = "+PONG\r\n"
			case "info":
				info := "# Server\r\nredis_version:" + version + "\r\n"
				reply = fmt.Sprintf("$%d\r\n%s\r\n", len(info), info)
			}
			if _, err := conn.Write([]byte(reply)); err != nil {
				return
			}
		}
	})
}

func TestPassword(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{Password: "s3cret"})
	refuses(t, "redis://"+server.Addr, "wants a password")
	refuses(t, "redis://:wrong@"+server.Addr, "refuses this user or password")
	l := open(t, server.URL)
	release(t, l, acquire(t, l, request("k")))
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other := open(t, "redis+unix://"+server.Socket+"?db=3"), open(t, server.URL+"/3")
	acquire(t, l, request("k"))
	if _, err := other.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("over TCP: %v, want ErrHeld", err)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{TLS: true})
	refuses(t, server.URL, "certificate")
	refuses(t, "redis://"+server.Addr, "rediss://")

	client := redis.NewClient(&redis.Options{Addr: server.Addr, TLSConfig: server.TLS})
	defer client.Close()
	l, err := redisbackend.New(t.Context(), client, redisbackend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	acquire(t, l, request("k"))

	ca := filepath.Join(filepath.Dir(server.Socket), "cert.pem")
	if _, err := open(t, server.URL+"?ca="+ca).Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("with the server's own authority: %v, want ErrHeld", err)
	}
	refuses(t, server.URL+"?ca="+os.Args[0], "no certificate")
}

func TestReplica(t *testing.T) {
	t.Parallel()
	primary, server := start(t), start(t)
	l := open(t, server.URL)
	held := acquire(t, l, request("held"))
	host, port, _ := net.SplitHostPort(primary.Addr)
	admin := direct(t, server)
	if err := admin.SlaveOf(t.Context(), host, port).Err(); err != nil {
		t.Fatal(err)
	}
	refuses(t, server.URL, "read-only replica of "+primary.Addr)
	_, err := l.Acquire(t.Context(), request("k"))
	if err == nil || errors.Is(err, locker.ErrHeld) || !strings.Contains(err.Error(), "read-only replica") {
		t.Errorf("Acquire on a replica: %v", err)
	}
	if _, err := l.Extend(t.Context(), held); err == nil {
		t.Error("Extend on a replica says nothing")
	}
	if n := direct(t, primary).Exists(t.Context(), "locker:{k}").Val(); n != 0 {
		t.Error("a lock was left behind")
	}
}

func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, other, admin := open(t, server.URL), open(t, server.URL), direct(t, server)
	held, stuck := acquire(t, l, request("held")), acquire(t, l, request("stuck"))
	waiting := wait(t.Context(), t, other, request("held"), 1)
	if err := admin.ConfigSet(t.Context(), "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	for _, req := range []locker.Request{request("k"), try("k"), request("held")} {
		_, err := l.Acquire(t.Context(), req)
		if err == nil || errors.Is(err, locker.ErrHeld) || !strings.Contains(err.Error(), "out of memory") {
			t.Errorf("Acquire: %v, want to be told that the memory is full", err)
		}
		release(t, l, cleanUp(req))
	}
	held, err := l.Extend(t.Context(), held)
	if err != nil {
		t.Errorf("what is held cannot be extended: %v", err)
	}
	release(t, l, held)
	release(t, l, held)
	if err := other.Break(t.Context(), locker.Holding{Key: "stuck", Token: stuck.Token}); err != nil {
		t.Errorf("what is held cannot be taken away: %v", err)
	}
	if err := admin.ConfigSet(t.Context(), "maxmemory", "0").Err(); err != nil {
		t.Fatal(err)
	}
	granted(t, waiting, 5*time.Second)
	acquire(t, l, try("k"))
}

func TestReplicas(t *testing.T) {
	t.Parallel()
	primary, server := start(t, "--repl-diskless-sync-delay", "0"), start(t)
	l := open(t, primary.URL+"?replicas=1")
	req := request("k")
	if _, err := l.Acquire(t.Context(), req); err == nil || !strings.Contains(err.Error(), "too few replicas") {
		t.Errorf("Acquire without a replica: %v", err)
	}
	release(t, l, cleanUp(req))

	host, port, _ := net.SplitHostPort(primary.Addr)
	replica, admin := direct(t, server), direct(t, primary)
	if err := replica.SlaveOf(t.Context(), host, port).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the replica confirms what is written", func() bool {
		pipe := admin.Pipeline()
		pipe.Set(t.Context(), "written", "", time.Minute)
		confirmed := pipe.Do(t.Context(), "wait", 1, 100)
		_, err := pipe.Exec(t.Context())
		n, _ := confirmed.Int()
		return err == nil && n == 1
	})
	lease := acquire(t, l, request("k"))
	if n := replica.Exists(t.Context(), "locker:{k}").Val(); n != 1 {
		t.Error("the lock was granted, and the replica does not know it")
	}
	if _, err := l.Extend(t.Context(), lease); err != nil {
		t.Error(err)
	}
	if err := replica.SlaveOf(t.Context(), "no", "one").Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Extend(t.Context(), lease); err == nil || errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend without a replica: %v, want an unknown outcome", err)
	}
	release(t, l, lease)

	if _, err := redisbackend.New(t.Context(), redis.NewRing(&redis.RingOptions{}), redisbackend.Options{Replicas: 1}); err == nil {
		t.Error("replicas of a ring were accepted")
	}
}

// A replica that confirms late, but in time, costs nothing but that time.
func TestSlowReplica(t *testing.T) {
	t.Parallel()
	primary := start(t, "--repl-diskless-sync-delay", "0")
	replica := start(t, "--replicaof", strings.ReplaceAll(primary.Addr, ":", " "))
	admin := direct(t, primary)
	eventually(t, "the replica is there", func() bool {
		return strings.Contains(admin.Info(t.Context(), "replication").Val(), "state=online")
	})
	l := open(t, primary.URL+"?replicas=1")
	for range 3 { // so that calls are made directly, without the patience of a worker
		release(t, l, acquire(t, l, request("k")))
	}
	if err := replica.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	resumed := make(chan error, 1)
	time.AfterFunc(300*time.Millisecond, func() { resumed <- replica.Resume(context.WithoutCancel(t.Context())) })
	began := time.Now()
	lease, err := l.Acquire(t.Context(), request("k"))
	if err != nil || time.Since(began) < 200*time.Millisecond {
		t.Errorf("acquire with a replica that confirms after 300 ms, after %v: %v", time.Since(began), err)
	}
	if err := <-resumed; err != nil {
		t.Fatal(err)
	}
	if err == nil {
		release(t, l, lease)
	}
}

func TestNilClient(t *testing.T) {
	t.Parallel()
	for _, client := range []redis.UniversalClient{nil, (*redis.Client)(nil), (*redis.ClusterClient)(nil)} {
		if _, err := redisbackend.New(t.Context(), client, redisbackend.Options{}); err == nil || !strings.Contains(err.Error(), "nil") {
			t.Errorf("New(%T): %v", client, err)
		}
	}
}

func TestRing(t *testing.T) {
	t.Parallel()
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"one": start(t).Addr}})
	defer ring.Close()
	if _, err := redisbackend.New(t.Context(), ring, redisbackend.Options{}); err == nil || !strings.Contains(err.Error(), "*redis.Ring") {
		t.Errorf("New(%T): %v", ring, err)
	}
}

func TestForeignKey(t *testing.T) {
	t.Parallel()
	server := start(t)
	l, admin := open(t, server.URL), direct(t, server)
	if err := admin.Set(t.Context(), "locker:{k}", "something else", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Acquire(t.Context(), request("k")); err == nil || !strings.Contains(err.Error(), "choose another prefix") {
		t.Errorf("Acquire: %v", err)
	}
	if value := admin.Get(t.Context(), "locker:{k}").Val(); value != "something else" {
		t.Errorf("the key was overwritten: %q", value)
	}

	// Others' keys do not hide the locks from an operator.
	if err := admin.HSet(t.Context(), "locker:{h}", "field", "value").Err(); err != nil {
		t.Fatal(err)
	}
	acquire(t, l, request("ours"))
	var seen []string
	for h, err := range l.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, h.Key)
	}
	if !slices.Equal(seen, []string{"ours"}) {
		t.Errorf("List tells of %q", seen)
	}
}
