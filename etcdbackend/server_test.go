package etcdbackend_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/etcdbackend"
	"github.com/fec20105/locker/internal/servertest"
)

// request waits for a key.
func request(key string) locker.Request {
	return locker.Request{Key: key, ID: uuid.NewString(), TTL: 10 * time.Second}
}

// try asks once.
func try(key string) locker.Request {
	req := request(key)
	req.NoWait = true
	return req
}

// works takes and releases a lock.
func works(t *testing.T, b locker.Locker) {
	t.Helper()
	lease, err := b.Acquire(t.Context(), try("works/"+uuid.NewString()))
	if err == nil {
		err = b.Release(t.Context(), lease)
	}
	if err != nil {
		t.Error(err)
	}
}

// refuses opens a URL that must be refused in bounded time, with these words, and without the password.
func refuses(t *testing.T, rawURL string, words ...string) {
	t.Helper()
	began := time.Now()
	l, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{})
	if err == nil {
		t.Errorf("%s is good", rawURL)
		_ = l.Close()
		return
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("%s was refused after %v", rawURL, took)
	}
	tells(t, err, words...)
}

// tells checks an error's words.
func tells(t *testing.T, err error, words ...string) {
	t.Helper()
	if _, ok := errors.AsType[*locker.Error](err); !ok {
		t.Errorf("%v is no *locker.Error", err)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error %q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), "s3cret") {
		t.Errorf("the error %q has the password", err)
	}
}

func TestBadURLs(t *testing.T) {
	t.Parallel()
	for rawURL, word := range map[string]string{
		"etcd://127.0.0.1:1?pasword=s3cret":                  "a parameter is unknown: known are ca, cert, dial_timeout, key",
		"etcd://127.0.0.1:1?dial_timeout=3":                  "dial_timeout must be a duration",
		"etcd://127.0.0.1:1?dial_timeout=1s&dial_timeout=2s": "dial_timeout is given 2 times",
		"etcd://user@127.0.0.1:1":                            "a user without a password",
		"etcd://:s3cret@127.0.0.1:1":                         "a password without a user",
		"etcd://127.0.0.1:1?ca=x":                            "etcds://",
		"etcds://127.0.0.1:1?ca=/does/not/exist":             "/does/not/exist",
		"etcds://127.0.0.1:1?cert=x":                         "belong together",
		"etcds://127.0.0.1:1?cert=/does/not&key=/exist":      "cert and key",
		"etcd://127.0.0.1:1/" + strings.Repeat("x", 300):     "256 bytes",
		"etcd://127.0.0.1:1/a%0ab":                           "control characters",
	} {
		refuses(t, rawURL, word)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	for rawURL, word := range map[string]string{
		"etcd://user:s3cret@127.0.0.1:1":               "check host",
		"etcd://127.0.0.1:1":                           "no server can be reached: check hosts and ports",
		"etcd://127.0.0.1:1,127.0.0.1:2":               "no server can be reached: check hosts and ports",
		"etcd://" + silent.Addr().String():             "no etcd answers there: check host and port",
		"etcd://user:s3cret@" + silent.Addr().String(): "check host",
		"etcds://" + silent.Addr().String():            "nobody answers there who speaks TLS",
	} {
		t.Run(rawURL, func(t *testing.T) {
			t.Parallel()
			refuses(t, rawURL, word)
		})
	}
	t.Run("bounded by ctx", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := locker.OpenLocker(ctx, "etcd://"+silent.Addr().String(), locker.Config{})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 2*time.Second {
			t.Errorf("after %v: %v, want DeadlineExceeded after 200 ms", time.Since(began), err)
		}
	})
}

// TestHalfReachable: of three endpoints one refuses connections and one accepts them and is silent.
func TestHalfReachable(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	b := open(t, "etcd://127.0.0.1:1,"+silent.Addr().String()+","+server.Addr)
	for range 10 {
		began := time.Now()
		works(t, b)
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("a lock and its release took %v", took)
		}
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{ClientCert: true})
	cert, key := server.CertFiles()
	refuses(t, server.URL, "name it with the parameter ca")
	refuses(t, server.URL+"?ca="+os.Args[0], "no certificate in PEM form")
	refuses(t, server.URL+"?ca="+cert, "certificate (parameters cert and key)")
	refuses(t, "etcd://"+server.Addr, "etcds://")

	other := servertest.Etcd(t, servertest.EtcdOptions{TLS: true})
	otherCert, _ := other.CertFiles()
	refuses(t, server.URL+"?ca="+otherCert+"&cert="+cert+"&key="+key, "authority that is not trusted", "parameter ca")

	works(t, open(t, server.URL+"?ca="+cert+"&cert="+cert+"&key="+key))
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{server.Addr}, TLS: server.TLS, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	b, err := etcdbackend.New(t.Context(), client, etcdbackend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	works(t, b)
	if err := b.Close(); err != nil {
		t.Error(err)
	}

	plain := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	refuses(t, "etcds://"+plain.Addr, "who speaks TLS", "etcd://")
}

func TestUsers(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	works(t, open(t, "etcd://me:s3cret@"+server.Addr)) // the library finds out that no user is wanted
	root := direct(t, server.URL)
	must := func(what string, err error) {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for user, prefix := range map[string]string{"root": "", "me": "mine/", "reader": "mine/"} {
		_, err := root.UserAdd(t.Context(), user, "s3cret")
		must("add a user", err)
		role := "role of " + user
		if user == "root" {
			role = "root"
		}
		_, err = root.RoleAdd(t.Context(), role)
		must("add a role", err)
		if prefix != "" {
			kind := clientv3.PermissionType(clientv3.PermReadWrite)
			if user == "reader" {
				kind = clientv3.PermissionType(clientv3.PermRead)
			}
			_, err = root.RoleGrantPermission(t.Context(), role, prefix, clientv3.GetPrefixRangeEnd(prefix), kind)
			must("grant", err)
		}
		_, err = root.UserGrantRole(t.Context(), user, role)
		must("grant a role", err)
	}
	_, err := root.AuthEnable(t.Context())
	must("enable", err)

	refuses(t, "etcd://"+server.Addr+"/mine", "the server wants a user")
	refuses(t, "etcd://me:wrong@"+server.Addr+"/mine", "the server refuses this user or password")
	refuses(t, "etcd://nobody:s3cret@"+server.Addr+"/mine", "the server refuses this user or password")
	refuses(t, "etcd://me:s3cret@"+server.Addr+"/yours", "lacks rights", "prefix")
	refuses(t, "etcd://me:s3cret@"+server.Addr, "lacks rights", "prefix")
	refuses(t, "etcd://reader:s3cret@"+server.Addr+"/mine", "lacks rights", "prefix")

	// What the documentation says is enough is enough for everything.
	mine := "etcd://me:s3cret@" + server.Addr + "/mine"
	b, other := open(t, mine), open(t, mine)
	lost := make(chan locker.Reason, 1)
	req := request("k")
	req.Lost = func(reason locker.Reason) { lost <- reason }
	lease, err := b.Acquire(t.Context(), req)
	must("acquire", err)
	lease, err = b.Extend(t.Context(), lease)
	must("extend", err)
	waited := make(chan error, 1)
	go func() {
		lease, err := other.Acquire(t.Context(), request("k"))
		if err == nil {
			err = other.Release(t.Context(), lease)
		}
		waited <- err
	}()
	for holding := (locker.Holding{}); holding.Waiters == 0; {
		holding, err = b.Inspect(t.Context(), "k")
		must("inspect", err)
	}
	for holding, err := range other.List(t.Context()) {
		must("list", err)
		must("break", other.Break(t.Context(), holding))
	}
	must("wait", <-waited)
	if reason := <-lost; reason != locker.ReasonTaken {
		t.Errorf("lost: %v", reason)
	}
	if err := b.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("release after a break: %v, want ErrLost", err)
	}
}

// TestRightsTakenAway: whoever may not write any more gets a clear error, and is not told that his lock is lost.
func TestRightsTakenAway(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	root := direct(t, server.URL)
	b := open(t, server.URL)
	lease, err := b.Acquire(t.Context(), request("held"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = root.UserAdd(t.Context(), "root", "s3cret")
	if err == nil {
		_, err = root.UserGrantRole(t.Context(), "root", "root")
	}
	if err == nil {
		_, err = root.AuthEnable(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Acquire(t.Context(), request("k"))
	if err == nil {
		t.Fatal("a lock was granted without a user")
	}
	tells(t, err, "the server wants a user")
	if _, err := b.Extend(t.Context(), lease); err == nil || errors.Is(err, locker.ErrLost) {
		t.Errorf("extend without a user: %v: it is not known whether the lock is held", err)
	}
}

// TestFullDatabase: a server whose database is full takes no writes until an operator has made room. What is held can be
// given up.
func TestFullDatabase(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Args: []string{"--quota-backend-bytes=1000000"}})
	admin := direct(t, server.URL)
	b := open(t, server.URL)
	held, err := b.Acquire(t.Context(), request("held"))
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 100_000)
	for err == nil {
		_, err = admin.Put(t.Context(), "big", big)
	}
	refuses(t, server.URL, "the server's database is full", "alarm")
	for range 2 { // the first may still find an idle lease
		_, err = b.Acquire(t.Context(), request("k"))
		if err == nil {
			t.Fatal("a full server has granted a lock")
		}
		tells(t, err, "the server's database is full", "alarm")
	}
	if _, err := b.Extend(t.Context(), held); err != nil {
		t.Errorf("extend: %v", err)
	}
	if err := b.Release(t.Context(), held); err != nil {
		t.Errorf("release: %v", err)
	}
	found, err := admin.Get(t.Context(), "locker/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil || len(found.Kvs) > 0 {
		t.Errorf("left behind: %v, %v", found.Kvs, err)
	}
}

// TestCompacted: a server that is compacted all the time forgets the revisions from which watches begin.
func TestCompacted(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	admin := direct(t, server.URL)
	var links [2]*link
	var lockers [2]*etcdbackend.Backend
	for i := range lockers {
		links[i] = newLink()
		lockers[i] = openConfig(t, server.URL, locker.Config{Dial: links[i].dial})
	}
	for i := range 6 {
		holder, next, wire := lockers[i%2], lockers[1-i%2], links[1-i%2]
		lease, err := holder.Acquire(t.Context(), request("k"))
		if err != nil {
			t.Fatal(err)
		}
		granted := make(chan error, 1)
		go func() {
			lease, err := next.Acquire(t.Context(), request("k"))
			if err == nil {
				err = next.Release(t.Context(), lease)
			}
			granted <- err
		}()
		for holding := (locker.Holding{}); holding.Waiters == 0; {
			if holding, err = holder.Inspect(t.Context(), "k"); err != nil {
				t.Fatal(err)
			}
		}
		if i >= 2 { // the watch begins anew, at a revision that is gone
			put, err := admin.Put(t.Context(), "other", "")
			if err == nil {
				put, err = admin.Put(t.Context(), "other", "")
			}
			if err == nil {
				_, err = admin.Compact(t.Context(), put.Header.Revision)
			}
			if err != nil {
				t.Fatal(err)
			}
			wire.reset()
		}
		released := time.Now()
		if err := holder.Release(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
		if err := <-granted; err != nil {
			t.Error(err)
		}
		if took := time.Since(released); took > 3*time.Second {
			t.Errorf("the next has waited for another %v", took)
		}
	}
}

// TestSilent: what the client library has to say does not reach stderr, and goes to the logger that was given.
func TestSilent(t *testing.T) {
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	stderr := captureStderr(t, func() {
		wire := newLink()
		b := openConfig(t, server.URL, locker.Config{Dial: wire.dial})
		works(t, b)
		wire.reset()
		works(t, b)
		if err := server.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		for _, err := range b.List(ctx) {
			tells(t, err, "deadline exceeded")
		}
		if err := server.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		refuses(t, "etcd://127.0.0.1:1")
		refuses(t, "etcds://"+server.Addr)
	})
	if stderr != "" {
		t.Errorf("on stderr stands: %s", stderr)
	}

	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if l, err := locker.OpenLocker(t.Context(), "etcd://127.0.0.1:1?dial_timeout=200ms", locker.Config{Logger: logger}); err == nil {
		_ = l.Close()
		t.Fatal("port 1 answers")
	}
	if !strings.Contains(log.String(), `component="etcd client"`) {
		t.Errorf("the logger has got %q", log.String())
	}
}
