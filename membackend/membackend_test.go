package membackend_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

const ttl = 10 * time.Second

// request asks for the key "k". In these tests the ID is also the holder's label.
func request(id string) locker.Request {
	return locker.Request{Key: "k", ID: id, TTL: ttl, Holder: id}
}

func acquire(t *testing.T, l locker.Locker, req locker.Request) locker.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), req)
	if err != nil {
		t.Fatalf("acquire by %s: %v", req.ID, err)
	}
	return lease
}

// start makes a request that waits, and returns when it does.
func start(t *testing.T, l locker.Locker, req locker.Request) (answers <-chan error) {
	t.Helper()
	c := make(chan error, 1)
	go func() {
		_, err := l.Acquire(t.Context(), req)
		c <- err
	}()
	synctest.Wait()
	return c
}

func TestLeaseEndsExactlyWithItsTTL(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		a, b := store.Locker(), store.Locker()
		lease := acquire(t, a, request("a"))
		waiting := start(t, b, request("b"))

		time.Sleep(ttl - 1)
		fresh, err := a.Extend(t.Context(), lease)
		if err != nil || fresh.Start != lease.Start.Add(ttl-1) || fresh.Token != lease.Token {
			t.Fatalf("Extend in the last nanosecond made %+v of %+v: %v", fresh, lease, err)
		}
		time.Sleep(ttl - 1)
		synctest.Wait()
		if len(waiting) > 0 {
			t.Fatal("granted before the TTL was over")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if len(waiting) == 0 {
			t.Fatal("not granted when the TTL was over")
		}
		if _, err := a.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Extend when the TTL was over: %v, want ErrLost", err)
		}
		if err := a.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Release when the TTL was over: %v, want ErrLost", err)
		}
	})
}

func TestHeldTellsWhoAndForHowLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := membackend.New()
		acquire(t, b, request("a"))
		time.Sleep(4 * time.Second)
		req := request("b")
		req.NoWait = true
		_, err := b.Acquire(t.Context(), req)
		held, ok := errors.AsType[*locker.HeldError](err)
		if want := (locker.HeldError{Key: "k", Holder: "a", Remaining: 6 * time.Second}); !ok || *held != want {
			t.Errorf("got %#v, want %#v", err, want)
		}
	})
}

func TestExpireTellsTheHolderAndGrantsTheNext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		if store.Expire("k") {
			t.Error("Expire of a key that nobody holds says that it was held")
		}
		var told []locker.Reason
		req := request("a")
		req.Lost = func(r locker.Reason) { told = append(told, r) }
		l := store.Locker()
		lease := acquire(t, l, req)
		waiting := start(t, l, request("b"))
		if !store.Expire("k") {
			t.Error("Expire of a key that is held says that it was free")
		}
		if err := <-waiting; err != nil {
			t.Errorf("the waiter got %v", err)
		}
		if len(told) != 1 || told[0] != locker.ReasonTaken {
			t.Errorf("the holder was told %v, want %v once", told, locker.ReasonTaken)
		}
		if _, err := l.Extend(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Extend after Expire: %v, want ErrLost", err)
		}
		if len(told) != 1 {
			t.Errorf("the holder was told %v: more than once", told)
		}
	})
}

func TestReleaseIsNoLoss(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		b := store.Locker()
		req := request("a")
		req.Lost = func(r locker.Reason) { t.Errorf("told %v", r) }
		if err := b.Release(t.Context(), acquire(t, b, req)); err != nil {
			t.Fatal(err)
		}
		acquire(t, b, request("b"))
		store.Expire("k")
		time.Sleep(ttl)
	})
}

func TestFinishedRequestsAreRememberedForAWhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := membackend.New()
		lease := acquire(t, b, request("released"))
		for range 2 {
			if err := b.Release(t.Context(), lease); err != nil {
				t.Fatalf("release: %v", err)
			}
		}
		if err := b.Release(t.Context(), locker.Lease{Key: "k", ID: "withdrawn"}); err != nil {
			t.Fatalf("withdrawal of a request that is on its way: %v", err)
		}
		time.Sleep(14 * time.Second)
		for _, id := range []string{"released", "withdrawn"} {
			if _, err := b.Acquire(t.Context(), request(id)); err == nil {
				t.Errorf("the request that was %s was granted when it came again", id)
			}
		}
		if err := b.Release(t.Context(), lease); err != nil {
			t.Errorf("release repeated after 14 s: %v", err)
		}
		time.Sleep(2 * time.Second)
		if err := b.Release(t.Context(), lease); !errors.Is(err, locker.ErrLost) {
			t.Errorf("release repeated after 16 s: %v, want ErrLost", err)
		}
	})
}

func TestRequestsAreIdempotent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		b := store.Locker()
		first, again := acquire(t, b, request("a")), acquire(t, b, request("a"))
		if first.Token != again.Token {
			t.Errorf("a retried request was granted twice: tokens %d and %d", first.Token, again.Token)
		}
		start(t, b, request("b"))
		start(t, b, request("b"))
		if h := store.Holdings(); len(h) != 1 || h[0].Waiters != 1 {
			t.Errorf("a retried request waits twice: %+v", h)
		}
		if err := b.Release(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil { // ends whichever wait the grant did not
			t.Fatal(err)
		}
	})
}

func TestLeaseOfAnotherStoreIsRefused(t *testing.T) {
	t.Parallel()
	a, b := membackend.New(), membackend.New()
	lease := acquire(t, a, request("a"))
	stateless := lease
	stateless.State = nil
	for _, lease := range []locker.Lease{lease, stateless} {
		if _, err := b.Extend(t.Context(), lease); err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("Extend of another store's lease: %v, want an error that is no loss", err)
		}
		if err := b.Release(t.Context(), lease); err == nil || errors.Is(err, locker.ErrLost) {
			t.Errorf("Release of another store's lease: %v, want an error that is no loss", err)
		}
	}
}

func TestHoldingsInspectListAndBreak(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		b := store.Locker()
		began := time.Now()
		lease := acquire(t, b, request("a"))
		start(t, b, request("b"))
		other := request("c")
		other.Key = "j"
		acquire(t, b, other)
		time.Sleep(time.Second)

		want := locker.Holding{Key: "k", ID: "a", Holder: "a", Token: lease.Token, Since: began, Remaining: ttl - time.Second, Waiters: 1}
		if got, err := b.Inspect(t.Context(), "k"); err != nil || got != want {
			t.Errorf("Inspect: %+v, %v; want %+v", got, err, want)
		}
		if got, err := b.Inspect(t.Context(), "free"); err != nil || got != (locker.Holding{Key: "free"}) {
			t.Errorf("Inspect of a free key: %+v, %v", got, err)
		}
		if all := store.Holdings(); len(all) != 2 || all[0].Key != "j" || all[1] != want {
			t.Errorf("Holdings: %+v", all)
		}
		var keys []string
		for h, err := range b.List(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, h.Key)
		}
		if got := strings.Join(keys, " "); got != "j k" {
			t.Errorf("List: %s", got)
		}
		for h, err := range b.List(t.Context()) {
			if err != nil || h.Key != "j" {
				t.Errorf("List goes on after a break: %+v, %v", h, err)
			}
			break
		}

		if err := b.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token + 1}); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Break of another grant: %v, want ErrLost", err)
		}
		if err := b.Break(t.Context(), locker.Holding{Key: "free"}); !errors.Is(err, locker.ErrLost) {
			t.Errorf("Break of a key that nobody holds: %v, want ErrLost", err)
		}
		if err := b.Break(t.Context(), want); err != nil {
			t.Errorf("Break: %v", err)
		}
		if got, _ := b.Inspect(t.Context(), "k"); got.ID != "b" || got.Waiters != 0 {
			t.Errorf("after Break: %+v, want the waiter to hold the key", got)
		}
	})
}

func TestClosedLockerAnswersErrClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		b, other := store.Locker(), store.Locker()
		lease := acquire(t, b, request("a"))
		waiting := start(t, b, request("b"))
		for range 2 {
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		}
		_, extend := b.Extend(t.Context(), lease)
		_, inspect := b.Inspect(t.Context(), "k")
		var list error
		for _, err := range b.List(t.Context()) {
			list = err
		}
		for call, err := range map[string]error{
			"the wait": <-waiting, "Extend": extend, "Release": b.Release(t.Context(), lease),
			"Inspect": inspect, "List": list, "Break": b.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}),
		} {
			if !errors.Is(err, locker.ErrClosed) {
				t.Errorf("%s: %v, want ErrClosed", call, err)
			}
		}
		if h, err := other.Inspect(t.Context(), "k"); err != nil || h.ID != "a" || h.Waiters != 0 {
			t.Errorf("what was held is left to expire, what waited is gone; but the store has %+v (%v)", h, err)
		}
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		b := store.Locker()
		acquire(t, b, request("a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		_, err := b.Acquire(ctx, request("b"))
		if took := time.Since(began); took != time.Second {
			t.Errorf("waited %v, want 1s", took)
		}
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, locker.ErrHeld) {
			t.Errorf("got %v, want DeadlineExceeded and ErrHeld", err)
		}
		if h := store.Holdings(); h[0].Waiters != 0 {
			t.Errorf("the wait is over, but %d wait still", h[0].Waiters)
		}
	})
}

func TestURL(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for rawURL, complaint := range map[string]string{
		"mem://":                  "mem://NAME",
		"mem://name/path":         "mem://NAME",
		"mem://user:secret@name":  "mem://NAME",
		"mem://name?token=secret": `a parameter is unknown`,
	} {
		_, err := locker.OpenLocker(ctx, rawURL, locker.Config{})
		if err == nil || !strings.Contains(err.Error(), complaint) || strings.Contains(err.Error(), "secret") {
			t.Errorf("opening %s: %v, want an error with %q and without the password", rawURL, err, complaint)
		}
	}

	open := func(name string) locker.Locker {
		l, err := locker.OpenLocker(ctx, "mem://"+name, locker.Config{})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	one, same, another := open("one"), open("one"), open("another")
	acquire(t, one, request("a"))
	req := request("b")
	req.NoWait = true
	if _, err := same.Acquire(ctx, req); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("the same name: %v, want ErrHeld", err)
	}
	acquire(t, another, req)
}
