package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fec20105/locker"
)

// fencingRows check the tokens by which a resource can refuse late writers, and that they cost the server nothing
// for ever.
var fencingRows = []row{
	{
		name:   "tokens-increase",
		clause: "A grant's Token is greater than that of every earlier grant of the key.",
		long:   true,
		run:    tokensIncrease,
	},
	{
		name:   "token-is-the-grants",
		clause: "Token is the same for the whole life of the grant, across Extend and after a successor took over.",
		run:    tokenIsTheGrants,
	},
	{
		name:   "token-survives-crash",
		clause: "Tokens still grow over the events that Capabilities.Fencing names.",
		hurts:  true,
		run:    tokenSurvivesCrash,
	},
	{
		name:   "token-range",
		clause: "A Token is at most 2^53, and passes every layer unharmed.",
		run:    tokenRange,
	},
	{
		name:   "no-leftovers",
		clause: "What stays on the server after a lock was released ends by itself.",
		needs:  needLeftovers,
		alone:  true,
		run:    noLeftovers,
	},
}

// maxToken is the greatest number up to which languages whose numbers are doubles count without holes.
const maxToken = 1 << 53

// tokens fails the row where the tokens of a key do not grow.
type tokens struct {
	t    *trial
	key  string
	last uint64
}

// granted notes the next grant.
func (k *tokens) granted(lease locker.Lease) {
	if lease.Token <= k.last || lease.Token > maxToken {
		k.t.Errorf("%q was granted with token %d after token %d", k.key, lease.Token, k.last)
	}
	k.last = max(k.last, lease.Token)
}

func tokensIncrease(t *trial) {
	const grants, losses = 500, 10
	var lockers [4]locker.Locker
	for i := range lockers {
		lockers[i], _ = t.open()
	}
	key := t.key("")
	seen := &tokens{t: t, key: key}
	brief := max(t.TTL/20, t.caps.MinTTL, locker.MinTTL)
	for i := range grants {
		l := lockers[i%len(lockers)]
		if i%(grants/losses) != 0 {
			lease := t.acquire(l, key, ttl(long))
			seen.granted(lease)
			t.release(l, lease)
			continue
		}
		// This one is lost: taken away, or left to expire.
		var lease locker.Lease
		if taken := i%(2*grants/losses) == 0 && t.Expire != nil; taken {
			lease = t.acquire(l, key, ttl(long))
			t.expire(lease)
		} else {
			lease = t.acquire(l, key, ttl(brief), noExtend)
		}
		seen.granted(lease)
		next, _ := t.freeWithin(lockers[(i+1)%len(lockers)], key, lease.Start, lease.TTL+t.freed())
		seen.granted(next)
		t.release(lockers[(i+1)%len(lockers)], next)
	}
}

func tokenIsTheGrants(t *trial) {
	l, _ := t.open()
	other, _ := t.open()
	client := t.clientOf(l)
	key := t.key("")

	lease := t.acquire(l, key)
	same := func(lock string, got uint64, want uint64) {
		if got != want {
			t.Errorf("%s has token %d, and was granted with %d", lock, got, want)
		}
	}
	for i := range 5 {
		t.release(other, t.acquire(other, t.key(fmt.Sprint("another lock ", i)))) // takes tokens, if they are shared
		fresh, err := l.Extend(t.ctx, lease)
		if err != nil {
			t.Fatalf("extend: %v", err)
		}
		same("the extended lease", fresh.Token, lease.Token)
		if holding := t.inspect(other, key); holding.Token != 0 {
			same("the server's record", holding.Token, lease.Token)
		}
		lease = fresh
	}
	t.release(l, lease)

	lock, err := client.Acquire(t.ctx, key, locker.WithoutHeartbeat())
	if err != nil {
		t.Fatalf("acquire: %v", err)
	}
	granted := lock.Token()
	if granted <= lease.Token {
		t.Errorf("granted with token %d after token %d", granted, lease.Token)
	}
	if err := lock.Extend(t.ctx); err != nil {
		t.Fatalf("extend: %v", err)
	}
	same("the extended lock", lock.Token(), granted)
	successor, _ := t.freeWithin(other, key, time.Now(), t.freed())
	same("the lost lock", lock.Token(), granted)
	if lost, ok := errors.AsType[*locker.LostError](lock.Err()); !ok || lost.Token != granted {
		t.Errorf("the lock with token %d ended with %v", granted, lock.Err())
	}
	if successor.Token <= granted {
		t.Errorf("the successor of token %d was granted token %d", granted, successor.Token)
	}
	if err := lock.Extend(t.ctx); !errors.Is(err, locker.ErrLost) {
		t.Errorf("extending the lost lock got %v, want ErrLost", err)
	}
	same("the lost lock", lock.Token(), granted)
	t.undisturbed(other, successor)
}

func tokenSurvivesCrash(t *trial) {
	events := []struct {
		name  string
		reach locker.Fencing
		cause func(context.Context) error
		times int
	}{
		{"Server.Crash", locker.FencingCrash, t.Server.Crash, 5},
		{"Server.Restart", locker.FencingRestart, t.Server.Restart, 1},
	}
	tried := false
	for _, e := range events {
		if t.caps.Fencing < e.reach || e.cause == nil {
			t.Logf("not tried: %s (the harness has it: %t; tokens survive: %v)", e.name, e.cause != nil, t.caps.Fencing)
			continue
		}
		tried = true
		l, _ := t.open()
		key := t.key(e.name)
		seen := &tokens{t: t, key: key}
		for range e.times {
			busy, stop := context.WithCancel(t.ctx)
			written := t.keepWriting(busy)
			lease := t.acquireAgain(l, key)
			t.outside(e.name, e.cause)
			seen.granted(lease)
			stop()
			<-written
			// If the server has kept the lock it is given back, so that the next need not wait for its end.
			poll(t.TTL, func() bool { return known(l.Release(t.ctx, lease)) })
		}
		last := t.acquireAgain(l, key)
		seen.granted(last)
		t.release(l, last)
	}
	if !tried {
		t.Skipf("nothing to try: tokens survive %v, and the harness can crash or restart the server: %t, %t",
			t.caps.Fencing, t.Server.Crash != nil, t.Server.Restart != nil)
	}
}

// keepWriting makes another client take and release locks until ctx ends, so that the server has always something to
// write. The channel is closed when it has stopped.
func (t *trial) keepWriting(ctx context.Context) (stopped <-chan struct{}) {
	l, _ := t.open()
	done := make(chan struct{})
	begun := make(chan struct{})
	t.spawn(func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			lease, err := l.Acquire(ctx, t.request(t.key(fmt.Sprint("written ", i%100))))
			if i == 0 {
				close(begun)
			}
			if err == nil {
				_ = l.Release(ctx, lease) // the server may be down
			} else {
				_ = poll(t.slack/10, func() bool { return ctx.Err() != nil })
			}
		}
	})
	<-begun
	return done
}

// acquireAgain acquires a key on a server that has just been started.
func (t *trial) acquireAgain(l locker.Locker, key string) (lease locker.Lease) {
	var err error
	if !poll(t.watchdog()/3, func() bool {
		lease, err = l.Acquire(t.ctx, t.request(key, noWait))
		return err == nil
	}) {
		t.Fatalf("the server is up again, but %q cannot be acquired: %v", key, err)
	}
	return lease
}

func tokenRange(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	key := t.key("")
	seen := &tokens{t: t, key: key}
	if t.SeedToken != nil {
		// Odd: doubles that are rounded lose it.
		seen.last = uint64(time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()) + 1
		t.outside("SeedToken", func(ctx context.Context) error { return t.SeedToken(ctx, key, seen.last) })
	} else {
		t.Logf("only with the tokens of today: the harness has no SeedToken")
	}
	for range 3 {
		lease := t.acquire(l, key, ttl(long))
		seen.granted(lease)
		fresh, err := l.Extend(t.ctx, lease)
		if err != nil || fresh.Token != lease.Token {
			t.Errorf("extending token %d: token %d, %v", lease.Token, fresh.Token, err)
		}
		if holding := t.inspect(observer, key); holding.Token != 0 && holding.Token != lease.Token {
			t.Errorf("granted token %d, but Inspect tells %d", lease.Token, holding.Token)
		}
		t.listed(observer, lease)
		t.release(l, lease)
	}

	breaker, ok := locker.As[locker.Breaker](observer)
	if !ok {
		return
	}
	lease := t.acquire(l, key, ttl(long))
	seen.granted(lease)
	for _, wrong := range []uint64{lease.Token - 1, lease.Token + 1} {
		if err := breaker.Break(t.ctx, locker.Holding{Key: key, Token: wrong}); !errors.Is(err, locker.ErrLost) {
			t.Errorf("breaking token %d, which is not the holder's %d: got %v, want ErrLost", wrong, lease.Token, err)
		}
	}
	t.mustBeHeld(observer, key)
	if err := breaker.Break(t.ctx, locker.Holding{Key: key, Token: lease.Token}); err != nil {
		t.Errorf("breaking token %d: %v", lease.Token, err)
	}
	t.mustBeFree(observer, key)
}

// listed fails the row if the backend can list, and does not list the lease with its token.
func (t *trial) listed(observer locker.Locker, lease locker.Lease) {
	lister, ok := locker.As[locker.Lister](observer)
	if !ok {
		return
	}
	for holding, err := range lister.List(t.ctx) {
		if errors.Is(err, errors.ErrUnsupported) {
			return
		}
		if err != nil {
			t.Errorf("list: %v", err)
			return
		}
		if holding.Key == lease.Key {
			if holding.Token != lease.Token {
				t.Errorf("granted token %d, but List tells %d", lease.Token, holding.Token)
			}
			return
		}
	}
	t.Errorf("List does not tell of %q, which is held", lease.Key)
}

func noLeftovers(t *trial) {
	l, _ := t.open()
	other, _ := t.open()
	t.parallel(2000, func(i int) {
		key := t.key(fmt.Sprint(i))
		lease := t.acquire(l, key)
		if i%20 == 0 { // with a waiter that gives up, and clean-ups
			req := t.request(key)
			ctx, cancel := t.timeout(t.slack / 20)
			defer cancel()
			if _, err := other.Acquire(ctx, req); err == nil {
				t.Errorf("%q was granted twice", key)
			}
			if err := other.Release(t.ctx, locker.Lease{Key: key, ID: req.ID}); err != nil {
				t.Errorf("withdrawing the request: %v", err)
			}
		}
		t.release(l, lease)
	})
	var all, immortal []string
	look := func() {
		t.outside("Leftovers", func(ctx context.Context) (err error) {
			all, immortal, err = t.Leftovers(ctx)
			return err
		})
	}
	lease := t.acquire(l, t.key("held"), ttl(long))
	if look(); len(all) == 0 {
		t.Errorf("the harness's Leftovers finds nothing although a lock is held: it looks in the wrong place")
	}
	t.release(l, lease)
	look()
	if n := len(immortal); n > 0 {
		t.Errorf("%d things stay on the server for ever, such as:\n%s", n, strings.Join(immortal[:min(n, 5)], "\n"))
	}
}
