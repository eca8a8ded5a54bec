package pgbackend_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// relay has goroutines of one Client take a lock in turn, whatever happens to them.
type relay struct {
	passed     atomic.Int64          // how often the lock was passed on
	turn, most atomic.Int64          // the same since it was let go, and the most of that
	failed     atomic.Pointer[error] // the latest of an acquire
	unreleased atomic.Pointer[error] // the same of a release
	stop       func()
}

// startRelay starts one. What it writes can be seen before it goes out.
func startRelay(t *testing.T, rawURL string, onPass func(c *tapped, p []byte) ([]byte, error)) *relay {
	t.Helper()
	r := new(relay)
	client, err := locker.New(tap(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
		switch {
		case strings.Contains(string(p), "EXECUTE locker_pass"):
			r.passed.Add(1)
			r.most.Store(max(r.most.Load(), r.turn.Add(1)))
			return onPass(c, p)
		case strings.Contains(string(p), "EXECUTE locker_free"):
			r.turn.Store(0)
		}
		return p, nil
	}), locker.WithTTL(long))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var last atomic.Uint64
	var runners sync.WaitGroup
	for range 4 {
		runners.Go(func() {
			for ctx.Err() == nil {
				lock, err := client.Acquire(ctx, "k")
				switch {
				case err == nil:
					if before := last.Swap(lock.Token()); before >= lock.Token() {
						t.Errorf("token %d was granted after %d", lock.Token(), before)
					}
					if err := lock.Release(ctx); err != nil {
						r.unreleased.Store(&err)
					}
				case ctx.Err() == nil:
					r.failed.Store(&err)
				}
			}
		})
	}
	r.stop = func() {
		cancel()
		runners.Wait()
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(r.stop)
	return r
}

func unchanged(_ *tapped, p []byte) ([]byte, error) { return p, nil }

// TestOthersGetTheirTurn wants a lock that the goroutines of another process pass on to each other without end: at the gate, and
// in a transaction that waits for the lock without one.
func TestOthersGetTheirTurn(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	r := startRelay(t, rawURL, unchanged)
	eventually(t, "the lock is passed on", func() bool { return r.passed.Load() > 100 })

	other := open(t, rawURL)
	const times = 20
	before := r.passed.Load()
	for range times {
		release(t, other, granted(t, wait(t.Context(), other, request("k"))))
	}
	t.Logf("another process waited while the lock was passed on %d times", (r.passed.Load()-before)/times)
	conn := direct(t, rawURL)
	for range times {
		tx := begin(t, conn)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := other.LockTx(ctx, tx, "k")
		cancel()
		if err != nil {
			t.Fatalf("a transaction waits for a lock that others pass on: %v", err)
		}
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if most := r.most.Load(); most > 8 {
		t.Errorf("the lock was passed on %d times before it was let go", most)
	}
	r.stop()
	release(t, other, acquire(t, other, try("k")))
	for _, err := range []*error{r.failed.Load(), r.unreleased.Load()} {
		if err != nil {
			t.Errorf("in between: %v", *err)
		}
	}
}

// TestPassIsCut ends the session while a lock is passed on: before the server hears of it, and before it can answer.
func TestPassIsCut(t *testing.T) {
	t.Parallel()
	for name, delivered := range map[string]bool{"before": false, "after": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rawURL := shared(t)
			observer := open(t, rawURL)
			var cuts atomic.Int64
			r := startRelay(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
				if cuts.Add(1)%20 != 0 {
					return p, nil
				}
				if delivered {
					if _, err := c.Conn.Write(p); err != nil {
						return nil, err
					}
				}
				_ = c.Close()
				return nil, net.ErrClosed
			})
			eventually(t, "the session was ended in the middle of it ten times", func() bool { return cuts.Load() > 200 })
			r.stop()
			release(t, observer, acquire(t, observer, request("k")))                        // nothing is left
			if err := r.unreleased.Load(); err != nil && !errors.Is(*err, locker.ErrLost) { // it ended between a grant and its release
				t.Errorf("the end of the session has a release fail: %v", *err)
			}
		})
	}
}

// TestPassFails takes the sequence of tokens away while a lock is passed on. Who had it has released it, and nothing is left.
func TestPassFails(t *testing.T) {
	t.Parallel()
	server := start(t)
	admin := direct(t, server.URL)
	var drop sync.Once
	r := startRelay(t, server.URL, func(_ *tapped, p []byte) ([]byte, error) {
		drop.Do(func() {
			if _, err := admin.Exec(t.Context(), "DROP SEQUENCE public.locker_tokens"); err != nil {
				t.Error(err)
			}
		})
		return p, nil
	})
	eventually(t, "it fails", func() bool { return r.failed.Load() != nil })
	r.stop()
	mustSay(t, *r.failed.Load(), "does not exist")
	if err := r.unreleased.Load(); err != nil {
		t.Errorf("release: %v", *err)
	}
	observer := open(t, server.URL)
	release(t, observer, acquire(t, observer, try("k")))
}
