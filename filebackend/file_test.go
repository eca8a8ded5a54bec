//go:build linux

package filebackend_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/filebackend"
)

func request(key string) locker.Request {
	return locker.Request{Key: key, ID: rand.Text(), TTL: time.Minute, NoWait: true, Holder: "a test"}
}

func acquire(t *testing.T, l locker.Locker, req locker.Request) locker.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), req)
	if err != nil {
		t.Fatalf("acquire %q: %v", req.Key, err)
	}
	return lease
}

// files are the names of what is in the folder of this boot, without what belongs to no lock.
func files(t *testing.T, folder string) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(folder, "locker-boot-*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if file := filepath.Base(path); !strings.HasSuffix(file, ".lock") && file != "swept" {
			names = append(names, file)
		}
	}
	return names
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for over := time.Now().Add(10 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(over) {
			t.Fatalf("still not true: %s", what)
		}
	}
}

func TestNothingStaysInTheFolder(t *testing.T) {
	folder := t.TempDir()
	b := open(t, folder)
	for i := range 200 {
		req := request(fmt.Sprint("key ", i))
		req.Lost = func(locker.Reason) {}
		lease := acquire(t, b, req)
		if err := b.Release(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if left := files(t, folder); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestReboot: what was held is free, and tokens grow, although the boot clock begins again.
func TestReboot(t *testing.T) {
	folder := t.TempDir()
	before := open(t, folder)
	lease := acquire(t, before, request("job"))
	filebackend.Reboot(t)
	after := open(t, folder)
	next := acquire(t, after, request("job"))
	if next.Token <= lease.Token {
		t.Errorf("token %d before the reboot, %d after it", lease.Token, next.Token)
	}
	boots, err := filepath.Glob(filepath.Join(folder, "locker-boot-*"))
	if err != nil || len(boots) != 1 {
		t.Errorf("of earlier boots is left: %q (%v)", boots, err)
	}
}

// TestTokensGrowAfterTheFolderWasDeleted, also under a Backend that has it open, and under one that waits.
func TestTokensGrowAfterTheFolderWasDeleted(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "locks")
	b := open(t, folder)
	lease := acquire(t, b, request("job"))
	waiting := make(chan locker.Lease, 1)
	go func() {
		if l, err := b.Acquire(t.Context(), locker.Request{Key: "job", ID: "waiter", TTL: time.Minute}); err == nil {
			waiting <- l
		}
	}()
	eventually(t, "the waiter waits", func() bool { h, err := b.Inspect(t.Context(), "job"); return err == nil && h.Waiters == 1 })
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend of a lock whose folder is gone: %v, want ErrLost", err)
	}
	next := <-waiting
	if next.Token <= lease.Token {
		t.Errorf("token %d, and after the folder was deleted %d", lease.Token, next.Token)
	}
	if err := b.Release(t.Context(), next); err != nil {
		t.Error(err)
	}
}

// TestTokensGrowOfManyKeys: so many that each reserves numbers of its own. Those are few: a folder that is deleted takes what was
// reserved with it, and tokens begin at the time of day.
func TestTokensGrowOfManyKeys(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "locks")
	last := make(map[string]uint64)
	for range 3 {
		b := open(t, folder)
		for i := range 100 {
			key := fmt.Sprint("job ", i)
			lease := acquire(t, b, request(key))
			if lease.Token <= last[key] {
				t.Fatalf("token %d of %q follows %d", lease.Token, key, last[key])
			}
			last[key] = lease.Token
		}
		if err := os.RemoveAll(folder); err != nil {
			t.Fatal(err)
		}
		<-time.NewTimer(5 * time.Millisecond).C
	}
}

func TestDamagedStateIsNeverFree(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	b := open(t, folder)
	lease := acquire(t, b, request("job"))
	path := filebackend.StateFile(b, "job")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	for what, text := range map[string][]byte{
		"empty":         nil,
		"cut":           whole[:len(whole)/2],
		"only the head": whole[:10],
		"one bit":       flipped,
		"another file":  []byte("hello\n"),
		"zeros":         make([]byte, len(whole)),
	} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		_, acquired := b.Acquire(t.Context(), request("job"))
		_, extended := b.Extend(t.Context(), lease)
		_, inspected := b.Inspect(t.Context(), "job")
		var listed error
		for _, err := range b.List(t.Context()) {
			listed = err
		}
		for call, err := range map[string]error{"Acquire": acquired, "Extend": extended, "Inspect": inspected, "List": listed} {
			if err == nil || errors.Is(err, locker.ErrLost) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "then delete the file") {
				t.Errorf("%s of a state that is damaged (%s): %v, want an error that names the file and the cure", call, what, err)
			}
		}
		filebackend.Sweep(b)
	}
	if err := os.WriteFile(path, []byte("locker-state 2 "+strings.TrimPrefix(string(whole), "locker-state 1 ")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Acquire(t.Context(), request("job")); err == nil || !strings.Contains(err.Error(), "later version") {
		t.Errorf("a state of a later version: %v", err)
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Extend(t.Context(), lease); err != nil {
		t.Errorf("after the repair: %v", err)
	}
	if err := os.Remove(path); err != nil { // the cure
		t.Fatal(err)
	}
	acquire(t, b, request("job"))
}

func TestDamagedCounters(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	b := open(t, folder)
	lease := acquire(t, b, request("job"))
	if err := b.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	locks, err := filepath.Glob(filepath.Join(folder, "locker-boot-*", "*.lock"))
	if err != nil || len(locks) != 1 {
		t.Fatal(locks, err)
	}
	if err := os.WriteFile(locks[0], []byte("not a counter"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Acquire(t.Context(), request("job")); err == nil || !strings.Contains(err.Error(), filepath.Dir(locks[0])) {
		t.Errorf("a damaged counter: %v", err)
	}
	if err := os.RemoveAll(filepath.Dir(locks[0])); err != nil {
		t.Fatal(err)
	}
	tokens := filepath.Join(folder, "tokens")
	if err := os.WriteFile(tokens, []byte("locker-tokens 1 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Acquire(t.Context(), request("job")); err == nil || !strings.Contains(err.Error(), tokens) {
		t.Errorf("a damaged file of tokens: %v", err)
	}
	if err := os.Remove(tokens); err != nil {
		t.Fatal(err)
	}
	if next := acquire(t, b, request("job")); next.Token <= lease.Token {
		t.Errorf("token %d, and after the cure %d", lease.Token, next.Token)
	}
}

// TestFallback: a waiter whose wake-up is lost looks by itself.
func TestFallback(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	holder, waiter := open(t, folder), open(t, folder)
	lease := acquire(t, holder, request("job"))
	filebackend.Deafen(t, waiter)
	granted := make(chan error, 1)
	go func() {
		_, err := waiter.Acquire(t.Context(), locker.Request{Key: "job", ID: "deaf", TTL: time.Minute})
		granted <- err
	}()
	eventually(t, "the waiter waits", func() bool { h, err := holder.Inspect(t.Context(), "job"); return err == nil && h.Waiters == 1 })
	if err := holder.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := <-granted; err != nil || time.Since(began) > 3*time.Second {
		t.Errorf("granted after %v: %v", time.Since(began), err)
	}
}

// TestSweep removes what crashed processes leave, and nothing else.
func TestSweep(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	b := open(t, folder)
	req := request("held")
	req.Lost = func(locker.Reason) {}
	acquire(t, b, req)
	req = request("expired")
	req.TTL = 10 * time.Millisecond
	acquire(t, b, req)
	whole := files(t, folder)
	boot := filepath.Dir(filebackend.StateFile(b, "held"))
	temp := strings.TrimSuffix(filebackend.StateFile(b, "cut short"), ".json") + ".tmp"
	for _, path := range []string{temp, filepath.Join(boot, "m-dead")} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond) // the lease
	filebackend.Sweep(b)
	expired := filepath.Base(filebackend.StateFile(b, "expired"))
	want := slices.DeleteFunc(whole, func(file string) bool { return file == expired })
	if got := files(t, folder); !slices.Equal(got, want) {
		t.Errorf("after a sweep there are %q, want %q", got, want)
	}
}

func TestBadFolders(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, complaint := range map[string]string{
		filepath.Join(base, "missing", "folder"): "make the folder " + filepath.Join(base, "missing") + " first",
		file:                                     "give a folder in which this user may write",
		"/proc/1":                                "give a folder in which this user may write",
	} {
		_, err := filebackend.New(t.Context(), path)
		if e, ok := errors.AsType[*locker.Error](err); !ok || e.Op != "open" || !strings.Contains(err.Error(), complaint) {
			t.Errorf("New(%s): %v, want %q", path, err, complaint)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := filebackend.New(ctx, filepath.Join(base, "late")); !errors.Is(err, context.Canceled) {
		t.Errorf("New with a ctx that is done: %v", err)
	}
}

func TestURL(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	for rawURL, complaint := range map[string]string{
		"file://" + folder + "?sync=1": "a parameter is unknown",
		"file://tmp/locks":             "three slashes",
		"file:tmp/locks":               "full path",
		"file://" + folder + "#part":   "full path",
	} {
		if _, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{}); err == nil || !strings.Contains(err.Error(), complaint) {
			t.Errorf("opening %s: %v, want %q", rawURL, err, complaint)
		}
	}
	l, err := locker.OpenLocker(t.Context(), "file://"+folder+"/a%20b", locker.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	acquire(t, l, request("job"))
	if _, err := os.Stat(filepath.Join(folder, "a b")); err != nil {
		t.Error(err)
	}
}

func TestSharedFileSystemsAreRecognised(t *testing.T) {
	t.Parallel()
	const line = `41 23 0:33 / /mnt/data rw,relatime shared:7 - nfs4 server:/data rw,vers=4.2`
	if kind := filebackend.FileSystem(line, "0:33"); kind != "nfs4" || !slices.Contains(filebackend.Shared, kind) {
		t.Errorf("an NFS mount is taken for %q", kind)
	}
	if kind := filebackend.FileSystem(line, "0:3"); kind != "" {
		t.Errorf("another device is taken for %q", kind)
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	one, other := filebackend.NewGuard(folder), filebackend.NewGuard(folder)
	if value, token, err := one.Get(t.Context(), "report"); value != nil || token != 0 || err != nil {
		t.Errorf("before the first write: %q, %d, %v", value, token, err)
	}
	for _, write := range []struct {
		guard *filebackend.Guard
		value string
		token uint64
		stale bool
	}{{one, "a", 7, false}, {one, "b", 7, false}, {other, "c", 9, false}, {one, "late", 7, true}, {one, "late", 8, true}, {other, "", 1 << 53, false}} {
		err := write.guard.Set(t.Context(), "report", []byte(write.value), write.token)
		if errors.Is(err, locker.ErrStaleToken) != write.stale || !write.stale && err != nil {
			t.Errorf("Set(%q, %d): %v", write.value, write.token, err)
		}
		if value, token, err := other.Get(t.Context(), "report"); !write.stale && (string(value) != write.value || token != write.token || err != nil) {
			t.Errorf("Get after Set(%q, %d): %q, %d, %v", write.value, write.token, value, token, err)
		}
	}
	for _, bad := range []string{"", ".", "..", "../x", "/etc/x", "missing/x"} {
		if err := one.Set(t.Context(), bad, nil, 1); err == nil {
			t.Errorf("Set(%q) worked", bad)
		}
	}
	if err := one.Set(t.Context(), "report", nil, 0); err == nil || errors.Is(err, locker.ErrStaleToken) {
		t.Errorf("Set with token 0: %v", err)
	}
	if err := os.WriteFile(filepath.Join(folder, ".report.token"), []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := one.Set(t.Context(), "report", nil, 10); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Set beside a damaged token: %v", err)
	}
}
