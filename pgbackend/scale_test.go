package pgbackend_test

import (
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// TestManyLocks holds 1,000 locks through a Client, under a heartbeat, and counts what they cost. It runs alone, because it
// counts goroutines and bytes of the whole process, and for two heartbeats the sessions at the server.
func TestManyLocks(t *testing.T) {
	const locks, ttl = 1000, 5 * time.Second
	rawURL := shared(t)
	look := direct(t, rawURL)
	client, err := locker.New(open(t, rawURL+"&application_name=many"), locker.WithTTL(ttl))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	keys, held := make([]string, locks), make([]*locker.Lock, locks)
	for i := range keys {
		keys[i] = strconv.Itoa(i)
	}
	holdAll := func(n int) {
		var acquiring sync.WaitGroup
		for from := range 10 {
			acquiring.Go(func() {
				for i := from; i < n; i += 10 {
					held[i] = hold(t, client, keys[i])
				}
			})
		}
		acquiring.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	releaseAll := func(n int) {
		for _, lock := range held[:n] {
			if err := lock.Release(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	holdAll(50) // connections and buffers are not locks
	releaseAll(50)
	clear(held)
	goroutines, before := footprint()
	holdAll(locks)
	more, after := footprint()
	if more -= goroutines; more > 10 {
		t.Errorf("%d locks run %d more goroutines", locks, more)
	}
	each := (after - before) / locks
	t.Logf("each lock costs %d bytes of heap", each)
	if each > 1400 {
		t.Errorf("each lock costs %d bytes of heap", each)
	}
	for deadline := time.Now().Add(ttl * 4 / 5); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		got := ask(t, look, "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'locker % many'")
		if len(got) > 2 {
			t.Fatalf("%d locks use the sessions %q: want at most 2", locks, got)
		}
	}
	releaseAll(locks)
}

func hold(t testing.TB, client *locker.Client, key string) *locker.Lock {
	t.Helper()
	lock, err := client.Acquire(t.Context(), key)
	if err != nil {
		t.Errorf("acquire: %v", err)
	}
	return lock
}

func footprint() (goroutines, heap int) {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return runtime.NumGoroutine(), int(stats.HeapAlloc)
}
