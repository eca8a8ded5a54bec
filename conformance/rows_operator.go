package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// operatorRows check what operators see and do, where the backend lets them, and what a backend reports by itself.
var operatorRows = []row{
	{
		name: "inspect",
		clause: "Inspect tells who holds a key, since when and for how long, and how many wait; and a Holding without Token " +
			"for a key that nobody holds.",
		run: inspects,
	},
	{
		name:   "list",
		clause: "List yields every key that is held, and ends after an error.",
		run:    lists,
	},
	{
		name: "break",
		clause: "Break frees a key if the grant with that token still holds it, and answers ErrLost if not. The holder learns " +
			"of it as of any eviction.",
		run: breaks,
	},
	{
		name: "lost-is-called-once",
		clause: "Request.Lost is called at most once, for its own lease, and never for a lease that was released or a request " +
			"that was not granted.",
		run: lostIsCalledOnce,
	},
}

// can finds an optional interface, or skips the row.
func can[T any](t *trial, l locker.Locker, name string) T {
	found, ok := locker.As[T](l)
	if !ok {
		t.Skipf("the backend is no %s", name)
	}
	return found
}

// supported skips the row if the backend, as it is set up, cannot do what it has a method for.
func (t *trial) supported(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("not supported: %v", err)
	}
	return err
}

func inspects(t *trial) {
	l, _ := t.open()
	observer, net := t.open()
	inspector := can[locker.Inspector](t, observer, "Inspector")
	key := t.key("")
	inspect := func() locker.Holding {
		h, err := inspector.Inspect(t.ctx, key)
		if t.supported(err) != nil {
			t.Fatalf("inspect: %v", err)
		}
		return h
	}
	free := func(when string) {
		if h := inspect(); h.Key != key || h.Token != 0 || h.ID != "" || h.Holder != "" || h.Remaining != 0 || h.Waiters > 0 {
			t.Errorf("%s Inspect tells %+v of a key that nobody holds or wants", when, h)
		}
	}
	held := func(when string, lease locker.Lease, label string, waiters int) {
		asked := time.Now()
		h := inspect()
		if h.Key != key || h.ID != lease.ID && h.ID != "" || h.Token != lease.Token || h.Holder != t.told(label) || h.Waiters != waiters && h.Waiters != -1 {
			t.Errorf("%s Inspect tells %+v of the grant %+v, for which %d wait", when, h, lease, waiters)
		}
		if !t.plausible(h.Remaining, lease, asked) {
			t.Errorf("%s Inspect tells that %v remain of a TTL of %v that began %v ago", when, h.Remaining, lease.TTL, time.Since(lease.Start))
		}
		if since := time.Since(h.Since); !h.Since.IsZero() && (since < -time.Minute || since > t.watchdog()+time.Minute) { // by the server's clock
			t.Errorf("%s Inspect tells that the key was granted %v ago", when, since)
		}
	}

	free("before the first grant")
	lease := t.acquire(l, key, ttl(long), labelled("first"))
	held("after a grant", lease, "first", 0)
	waiting := t.queueUp(observer, net, observer, key, 1)
	held("while another waits", lease, "first", 1)
	if extended, err := l.Extend(t.ctx, lease); err != nil {
		t.Errorf("extend: %v", err)
	} else {
		held("after an Extend", extended, "first", 1)
	}
	t.release(l, lease)
	second := receive(t, waiting, max(t.caps.Fallback+t.slack, t.freed()), "a waiter gets the key that was released").lease
	held("after a handover", second, "", 0)
	t.release(observer, second)
	free("after a release")
	third := t.acquire(l, key, noExtend, labelled("third"))
	held("before the end of a lease", third, "third", 0)
	t.pass(time.Until(third.Start.Add(t.freed())))
	free("after the end of a lease")
}

func lists(t *trial) {
	const many = 60
	l, _ := t.open()
	observer, _ := t.open()
	lister := can[locker.Lister](t, observer, "Lister")
	var leases [many]locker.Lease
	label := func(i int) string { return fmt.Sprint("holder ", i) }
	t.parallel(many, func(i int) {
		leases[i] = t.acquire(l, t.key(fmt.Sprint(i)), ttl(long), labelled(label(i)))
		if i%2 == 1 {
			t.release(l, leases[i])
		}
	})
	seen := make(map[string]locker.Holding)
	for h, err := range lister.List(t.ctx) {
		if t.supported(err) != nil {
			t.Fatalf("list: %v", err)
		}
		seen[h.Key] = h
	}
	for i, lease := range leases {
		h, ok := seen[lease.Key]
		switch {
		case i%2 == 1 && ok:
			t.Errorf("List tells of %q, which was released before: %+v", lease.Key, h)
		case i%2 == 0 && (h.ID != lease.ID && h.ID != "" || h.Token != lease.Token || h.Holder != t.told(label(i))):
			t.Errorf("List tells %+v of the grant %+v of %q", h, lease, label(i))
		}
	}
	for _, err := range lister.List(t.ctx) {
		if err != nil {
			t.Errorf("list: %v", err)
		}
		break // and nothing of it is left, as the end of each row checks
	}
	ended, cancel := context.WithCancel(t.ctx)
	cancel()
	errs := 0
	for _, err := range lister.List(ended) {
		if errs > 0 {
			t.Errorf("List goes on after an error")
		}
		if err != nil {
			errs++
		}
	}
	if errs == 0 {
		t.Errorf("List with a ctx that is done yields no error")
	}
}

func breaks(t *trial) {
	client, _ := t.client()
	observer, net := t.open()
	breaker := can[locker.Breaker](t, observer, "Breaker")
	breaking := func(key string, token uint64) error {
		return t.supported(breaker.Break(t.ctx, locker.Holding{Key: key, Token: token}))
	}
	key := t.key("")
	for _, token := range []uint64{0, 1, maxToken} {
		if err := breaking(key, token); !errors.Is(err, locker.ErrLost) {
			t.Errorf("breaking token %d of a key that nobody holds: got %v, want ErrLost", token, err)
		}
	}

	lock := t.hold(client, key)
	for _, wrong := range []uint64{0, lock.Token() - 1, lock.Token() + 1} {
		if err := breaking(key, wrong); !errors.Is(err, locker.ErrLost) {
			t.Errorf("breaking token %d, which is not the holder's %d: got %v, want ErrLost", wrong, lock.Token(), err)
		}
	}
	t.mustBeHeld(observer, key)
	granted := t.queueUp(observer, net, observer, key, 1)
	told := time.Now().Add(t.soon())
	if !t.caps.ReportsLoss {
		told = told.Add(t.TTL / 3) // at the next heartbeat
	}
	if err := breaking(key, lock.Token()); err != nil {
		t.Fatalf("breaking the holder's token: %v", err)
	}
	if reason := t.endsBy(lock, told); reason != locker.ReasonTaken && reason != locker.ReasonDisconnected {
		t.Errorf("the holder of a lock that was broken was told %v", reason)
	}
	next := receive(t, granted, max(t.caps.Fallback+t.slack, t.freed()), "a waiter gets the key that was broken").lease
	if next.Token <= lock.Token() {
		t.Errorf("token %d follows %d, which was broken", next.Token, lock.Token())
	}
	if err := breaking(key, lock.Token()); !errors.Is(err, locker.ErrLost) {
		t.Errorf("breaking a token a second time: got %v, want ErrLost", err)
	}
	t.undisturbed(observer, next)

	// The same on the Locker, whose caller may not have been told yet.
	l, _ := t.open()
	lease := t.acquire(l, key, ttl(long))
	if err := breaking(key, lease.Token); err != nil {
		t.Fatalf("breaking the holder's token: %v", err)
	}
	if _, err := l.Extend(t.ctx, lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend of a lease that was broken: got %v, want ErrLost", err)
	}
	if err := l.Release(t.ctx, lease); !errors.Is(err, locker.ErrLost) {
		t.Errorf("Release of a lease that was broken: got %v, want ErrLost", err)
	}
	t.mustBeFree(observer, key)
}

func lostIsCalledOnce(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	var calls [5]atomic.Int64
	counted := func(i int) func(*locker.Request) {
		return func(req *locker.Request) { req.Lost = func(locker.Reason) { calls[i].Add(1) } }
	}
	released := t.acquire(l, t.key("released"), ttl(long), counted(0))
	neighbour := t.acquire(l, t.key("neighbour"), ttl(long), counted(1))
	if _, err := l.Acquire(t.ctx, t.request(neighbour.Key, noWait, counted(2))); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a key that is held: got %v, want ErrHeld", err)
	}
	expired := t.acquire(l, t.key("expired"), counted(3))
	t.release(l, released)
	if t.Expire != nil {
		evicted := t.acquire(l, t.key("evicted"), ttl(long), counted(4))
		t.expire(evicted)
		if t.caps.ReportsLoss {
			t.eventually(t.soon(), "the holder of a lock that was taken away is told", func() bool { return calls[4].Load() > 0 })
		}
		for range 2 {
			if _, err := l.Extend(t.ctx, evicted); !errors.Is(err, locker.ErrLost) {
				t.Errorf("Extend of a lease that was evicted: got %v, want ErrLost", err)
			}
		}
		// The next holder of the key is lost on its own account.
		t.release(observer, t.acquire(observer, evicted.Key, ttl(long)))
	}
	t.pass(time.Until(expired.Start.Add(t.freed())))
	t.undisturbed(l, neighbour)
	for i, what := range []string{"was released", "was held all the time, and then released", "was refused", "has expired", "was evicted"} {
		most := int64(0)
		if i > 2 {
			most = 1
		}
		if n := calls[i].Load(); n > most {
			t.Errorf("Lost was called %d times for a request that %s, want %d at most", n, what, most)
		}
	}
}
