package conformance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fec20105/locker"
)

// cleanupRows check that waits end when they should, and that nothing is left behind however they and the locks end.
var cleanupRows = []row{
	{
		name: "wait-bound",
		clause: "A wait that ends with ctx returns soon, matches ctx's error, and ErrHeld if it had learned that " +
			"the key was held.",
		run: waitBound,
	},
	{
		name:   "wait-bound-race",
		clause: "Whatever an Acquire whose ctx ends returns, nothing of it stays at the server.",
		alone:  true,
		run:    waitBoundRace,
	},
	{
		name:   "cancel-waiting",
		clause: "A waiter that is cancelled leaves the queue, and disturbs neither those before nor those behind it.",
		run:    cancelWaiting,
	},
	{
		name:   "cancelled-before",
		clause: "A call whose ctx is already done sends nothing.",
		run:    cancelledBefore,
	},
	{
		name:   "release-twice",
		clause: "A second Release does not touch a successor. That of a Lock answers like the first.",
		run:    releaseTwice,
	},
	{
		name:   "release-on-dead-ctx",
		clause: "A lock is released also when the work's ctx was cancelled.",
		run:    releaseOnDeadCtx,
	},
	{
		name: "held-is-known",
		clause: "ErrHeld says that the key was held: no request gets it over a dead link, nor because an earlier one of the same " +
			"Locker was not answered.",
		run: heldIsKnown,
	},
	{
		name: "ambiguous-acquire",
		clause: "A grant whose answer was lost is withdrawn: the key is free as soon as the server can be reached " +
			"again.",
		run: ambiguousAcquire,
	},
	{
		name: "ambiguous-release",
		clause: "A lost answer is not a lost lock: a repeated Release answers nil, no loss is reported, and no " +
			"compensation runs.",
		run: ambiguousRelease,
	},
	{
		name: "acquire-is-idempotent",
		clause: "Acquire is idempotent by ID: a request that is made again MUST NOT be granted twice, and one that was " +
			"released or withdrawn MUST neither be granted nor queued.",
		run: acquireIsIdempotent,
	},
	{
		name:   "extend-is-idempotent",
		clause: "An Extend that is delivered twice is answered twice alike, and never touches a successor.",
		run:    extendIsIdempotent,
	},
	{
		name:   "release-is-idempotent",
		clause: "A repeated Release answers nil like the first, and never touches a successor.",
		run:    releaseIsIdempotent,
	},
	{
		name: "release-lost-in-blip",
		clause: "A Release that got no answer does not keep the lock beyond its TTL, also while neighbours are " +
			"renewed.",
		run: releaseLostInBlip,
	},
	{
		name: "close",
		clause: "Close ends waits with ErrClosed and held locks with ReasonClosed, answers nil the second time, and " +
			"returns in a few seconds also when the server does not answer.",
		run: closing,
	},
}

func waitBound(t *trial) {
	holder, _ := t.open()
	observer, _ := t.open()
	const patience = 300 * time.Millisecond
	bounded := func(key string, net *Network, acquire func(ctx context.Context, key string) error) {
		t.promptly("a wait of "+patience.String(), patience+t.soon(), func(try int) (took time.Duration) {
			key := t.key(fmt.Sprint(key, " ", try))
			lease := t.acquire(holder, key, ttl(long))
			replies := net.Stats().Replies
			began := time.Now()
			ctx, cancel := t.timeout(patience)
			defer cancel()
			err := acquire(ctx, key)
			if took = time.Since(began); took < patience {
				t.Errorf("a wait of %v returned after %v", patience, took)
			}
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want DeadlineExceeded", err)
			}
			if learned := net.Stats().Replies > replies; learned && !errors.Is(err, locker.ErrHeld) {
				t.Errorf("got %v, want ErrHeld too: the server had answered, and the key was held", err)
			}
			t.mustBeHeld(observer, key)
			t.release(holder, lease)
			t.withdrawn(observer, key)
			return took
		})
	}

	waiter, net := t.open()
	bounded("Locker.Acquire", net, func(ctx context.Context, key string) error {
		req := t.request(key, ttl(long))
		_, err := waiter.Acquire(ctx, req)
		if err := waiter.Release(t.ctx, locker.Lease{Key: key, ID: req.ID}); err != nil {
			t.Errorf("withdrawing the request: %v", err)
		}
		return err
	})
	client, net := t.client(locker.WithTTL(long))
	bounded("Client.Acquire", net, func(ctx context.Context, key string) error {
		_, err := client.Acquire(ctx, key)
		return err
	})
	bounded("Client.Acquire, WithWait", net, func(_ context.Context, key string) error {
		_, err := client.Acquire(t.ctx, key, locker.WithWait(patience))
		return err
	})
}

func waitBoundRace(t *trial) {
	const clients, each, hot = 8, 250, 2
	observer, _ := t.open()
	granted := make([]int, clients)
	t.parallel(clients, func(i int) {
		client, _ := t.client(locker.WithTTL(long))
		for n := range each {
			patience := 100*time.Microsecond + time.Duration(n)*5900*time.Microsecond/(each-1)
			ctx, cancel := t.timeout(patience)
			lock, err := client.Acquire(ctx, t.key(fmt.Sprint((i+n)%hot)))
			cancel()
			switch {
			case err == nil:
				granted[i]++
				t.pass(time.Millisecond)
				if err := lock.Release(t.ctx); err != nil {
					t.Errorf("release: %v", err)
				}
			case !errors.Is(err, context.DeadlineExceeded):
				t.Errorf("an Acquire with a ctx of %v got %v, want DeadlineExceeded or a lock", patience, err)
			}
		}
		if err := client.Close(); err != nil { // waits for its clean-ups
			t.Errorf("close: %v", err)
		}
	})
	for i := range hot {
		t.withdrawn(observer, t.key(fmt.Sprint(i)))
	}
	t.Logf("locks granted to each client, of %d requests: %v", each, granted)
}

func cancelWaiting(t *trial) {
	t.promptly("cancelling an Acquire", t.soon(), func(try int) time.Duration {
		return t.cancelSecond(t.key(fmt.Sprint(try)))
	})
}

// cancelSecond cancels the second of three waiters, and returns how long that takes.
func (t *trial) cancelSecond(key string) (took time.Duration) {
	type outcome struct {
		waiter int
		err    error
	}
	holder, _ := t.open()
	observer, _ := t.open()
	held := t.acquire(holder, key, ttl(long))
	outcomes := make(chan outcome, 3)
	var cancels [3]context.CancelFunc
	for i := range cancels {
		client, net := t.client(locker.WithTTL(long))
		ctx, cancel := context.WithCancel(t.ctx)
		t.cleanup(cancel)
		cancels[i] = cancel
		before := asked(net)
		t.spawn(func() {
			lock, err := client.Acquire(ctx, key)
			outcomes <- outcome{i, err}
			if err == nil {
				err = lock.Release(t.ctx)
			}
			if err != nil && i != 1 {
				t.Errorf("waiter %d, beside the cancelled one, got %v", i, err)
			}
		})
		t.waiting(observer, key, i+1, before)
	}

	began := time.Now()
	cancels[1]()
	o := receive(t, outcomes, t.TTL+t.slack, "a cancelled Acquire returns")
	if took = time.Since(began); o.waiter != 1 || !errors.Is(o.err, context.Canceled) {
		t.Fatalf("waiter 1 was cancelled, and waiter %d got %v", o.waiter, o.err)
	}
	t.waiting(observer, key, 2)
	if len(outcomes) > 0 {
		t.Fatalf("waiter 1 was cancelled, and waiter %d returned too", (<-outcomes).waiter)
	}

	t.release(holder, held)
	handover := t.TTL + t.caps.Fallback + t.slack
	for _, next := range []int{0, 2} {
		o := receive(t, outcomes, handover, fmt.Sprintf("waiter %d gets the lock, after waiter 1 was cancelled", next))
		if t.caps.Fair && o.waiter != next {
			t.Errorf("waiter %d got the lock when it was the turn of waiter %d", o.waiter, next)
		}
	}
	t.withdrawn(observer, key)
	return took
}

func cancelledBefore(t *trial) {
	l, net := t.open()
	observer, _ := t.open()
	client := t.clientOf(l)
	key := t.key("")
	lease := t.acquire(l, t.key("held"), ttl(long))
	cancelled, cancel := context.WithCancel(t.ctx)
	cancel()
	late, stop := context.WithDeadline(t.ctx, time.Now().Add(-time.Second))
	defer stop()
	calls := map[string]func(ctx context.Context) error{
		"Acquire":        func(ctx context.Context) error { _, err := l.Acquire(ctx, t.request(key, noWait)); return err },
		"a waiting one":  func(ctx context.Context) error { _, err := l.Acquire(ctx, t.request(lease.Key)); return err },
		"Extend":         func(ctx context.Context) error { _, err := l.Extend(ctx, lease); return err },
		"Release":        func(ctx context.Context) error { return l.Release(ctx, lease) },
		"Client.Acquire": func(ctx context.Context) error { _, err := client.Acquire(ctx, key); return err },
		"Client.Do": func(ctx context.Context) error {
			return client.Do(ctx, key, func(context.Context, *locker.Lock) error { return errors.New("the work ran") })
		},
	}
	t.atRest(net)
	named := net.Naming(key)
	for name, call := range calls {
		for _, ctx := range []context.Context{cancelled, late} {
			if err := call(ctx); !errors.Is(err, ctx.Err()) {
				t.Errorf("%s with a ctx that is done got %v, want %v", name, err, ctx.Err())
			}
			// What an idle Locker sends of its own accord may come between, but not every time.
			const tries = 3
			sent := 0
			for range tries {
				before := net.Stats().BytesUp
				_ = call(ctx)
				if net.Stats().BytesUp != before {
					sent++
				}
			}
			if sent == tries {
				t.Errorf("%s with a ctx that is done sends something", name)
			}
		}
	}
	if n := named(); n > 0 {
		t.Errorf("%d requests named a key for which no ctx was alive", n)
	}
	t.mustBeHeld(observer, lease.Key)
	t.release(l, lease)
}

func releaseTwice(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	twice := func(key string, release func() error, want error) {
		if err := release(); err != nil {
			t.Errorf("the first Release: %v", err)
		}
		again := func() {
			if err := release(); err != nil && !errors.Is(err, want) {
				t.Errorf("the second Release got %v, want nil or %v", err, want)
			}
		}
		again()
		successor := t.acquire(observer, key, ttl(long))
		again()
		t.mustBeHeld(l, key)
		t.release(observer, successor)
	}

	lease := t.acquire(l, t.key("locker"), ttl(long))
	twice(lease.Key, func() error { return l.Release(t.ctx, lease) }, locker.ErrLost)

	client := t.clientOf(l, locker.WithTTL(long))
	lock, err := client.Acquire(t.ctx, t.key("client"))
	if err != nil {
		t.Fatalf("acquire: %v", err)
	}
	twice(lock.Key(), func() error { return lock.Release(t.ctx) }, nil)
}

func releaseOnDeadCtx(t *trial) {
	client, _ := t.client(locker.WithTTL(long))
	observer, _ := t.open()
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()

	lock, err := client.Acquire(ctx, t.key("release"))
	if err != nil {
		t.Fatalf("acquire: %v", err)
	}
	err = client.Do(ctx, t.key("do"), func(ctx context.Context, _ *locker.Lock) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	if !errors.Is(err, context.Canceled) || errors.Is(err, locker.ErrLost) {
		t.Errorf("Do got %v: the work was cancelled and said so, and nothing was lost", err)
	}
	t.mustBeFree(observer, t.key("do"))

	if err := lock.Release(ctx); err != nil {
		t.Errorf("Release with a ctx that was cancelled: %v", err)
	}
	t.mustBeFree(observer, lock.Key())
}

func closing(t *trial) {
	holder, _ := t.open()
	observer, _ := t.open()
	wait := make(chan error, 2)
	closed := func(waits int, close func() error) {
		for range 2 {
			if err := close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		for range waits {
			if err := receive(t, wait, t.TTL+t.slack, "Close ends a wait"); !errors.Is(err, locker.ErrClosed) {
				t.Errorf("the wait got %v, want ErrClosed", err)
			}
		}
	}

	l, net := t.open()
	lease := t.acquire(l, t.key("held by a locker"))
	busy := t.acquire(holder, t.key("wanted by a locker"), ttl(long))
	before := asked(net)
	t.spawn(func() { _, err := l.Acquire(t.ctx, t.request(busy.Key)); wait <- err })
	t.waiting(observer, busy.Key, 1, before)
	closed(1, l.Close)
	_, acquire := l.Acquire(t.ctx, t.request(t.key("")))
	_, extend := l.Extend(t.ctx, lease)
	calls := []error{acquire, extend, l.Release(t.ctx, lease)}
	if inspector, ok := locker.As[locker.Inspector](l); ok {
		if _, err := inspector.Inspect(t.ctx, lease.Key); !errors.Is(err, errors.ErrUnsupported) {
			calls = append(calls, err)
		}
	}
	for _, err := range calls {
		if !errors.Is(err, locker.ErrClosed) {
			t.Errorf("a call after Close got %v, want ErrClosed", err)
		}
	}
	if caps := l.Capabilities(); caps != t.caps {
		t.Errorf("Capabilities after Close are %+v, and were %+v", caps, t.caps)
	}
	// The wait that was ended has been granted nothing, and is a dead waiter at worst.
	t.release(holder, busy)
	next, _ := t.freeWithin(observer, busy.Key, time.Now(), max(t.caps.Fallback+t.slack, t.freed()))
	t.release(observer, next)

	client, net := t.client(locker.WithTTL(long))
	lock, err := client.Acquire(t.ctx, t.key("held by a client"))
	if err != nil {
		t.Fatalf("acquire: %v", err)
	}
	busy = t.acquire(holder, t.key("wanted by a client"), ttl(long))
	before = asked(net)
	for _, key := range []string{busy.Key, lock.Key()} { // the second waits in the process
		t.spawn(func() { _, err := client.Acquire(t.ctx, key); wait <- err })
	}
	t.waiting(observer, busy.Key, 1, before)
	closed(2, client.Close)
	if lost, ok := errors.AsType[*locker.LostError](lock.Err()); !ok || lost.Reason != locker.ReasonClosed {
		t.Errorf("the held lock ended with %v, want the reason %v", lock.Err(), locker.ReasonClosed)
	}
	t.mustBeFree(observer, lock.Key())
	if _, err := client.Acquire(t.ctx, t.key("")); !errors.Is(err, locker.ErrClosed) {
		t.Errorf("Acquire after Close got %v, want ErrClosed", err)
	}
	t.release(holder, busy)
	t.withdrawn(observer, busy.Key)

	t.closeOnDeadLink(holder)
}

// closesWithin is how long Close may take when the server does not answer: a backend may have time-outs of its own.
const closesWithin = 5 * time.Second

// closeOnDeadLink closes a Locker while requests of its hang on a link that is cut.
func (t *trial) closeOnDeadLink(holder locker.Locker) {
	l, net := t.open()
	lease := t.acquire(l, t.key("extended over a dead link"), ttl(long))
	busy := t.acquire(holder, t.key("wanted over a dead link"), ttl(long))
	net.Cut()
	before := asked(net)
	extended, acquired, closed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	t.spawn(func() { _, err := l.Extend(t.ctx, lease); extended <- err })
	t.spawn(func() { _, err := l.Acquire(t.ctx, t.request(busy.Key)); acquired <- err })
	t.eventually(t.soon(), "a request is on its way", func() bool { return net.Stats().Requests > before.requests })

	t.spawn(func() { closed <- l.Close() })
	_ = receive(t, closed, closesWithin+t.slack, "Close returns while requests hang on a dead link")
	if err := receive(t, extended, t.soon(), "an Extend on a dead link ends with Close"); err == nil || errors.Is(err, locker.ErrLost) {
		t.Errorf("an Extend on a dead link got %v from Close, want an unknown outcome", err)
	}
	if err := receive(t, acquired, t.soon(), "an Acquire on a dead link ends with Close"); !errors.Is(err, locker.ErrClosed) {
		t.Errorf("an Acquire on a dead link got %v from Close, want ErrClosed", err)
	}
	net.Heal()
	t.release(holder, busy)
}
