package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// contractRows check what holds without any fault: who is granted what, and for how long.
var contractRows = []row{
	{
		name:   "exclusive",
		clause: "Of two requests for a key one is granted, and the other is told ErrHeld until the first is released.",
		run:    exclusive,
	},
	{
		name:   "exclusive-same-client",
		clause: "Two Acquires through one Locker exclude each other exactly like two processes do.",
		run:    exclusiveSameClient,
	},
	{
		name:   "one-release-frees",
		clause: "Release answers nil when the server has freed the lock, however often it was held before.",
		run:    oneReleaseFrees,
	},
	{
		name: "keys-are-independent",
		clause: "Keys that differ in any byte are different locks; a Key is 1 to MaxKeyLength bytes of UTF-8 " +
			"without NUL.",
		alone: true,
		run:   keysAreIndependent,
	},
	{
		name:   "acquire-ctx-is-not-the-hold",
		clause: "ctx bounds the call, not the hold: a ctx that ends does not end the lease that the call returned.",
		run:    acquireCtxIsNotTheHold,
	},
	{
		name: "ttl-per-call",
		clause: "A lease has the TTL of its own request. A backend may grant a longer one and says so; never a " +
			"shorter one.",
		run: ttlPerCall,
	},
	{
		name:   "holder-dies",
		clause: "The lock of a process that dies is free by TTL + Granularity + Expiry.",
		needs:  needProcess,
		run:    holderDies,
	},
	{
		name:   "shared-timer",
		clause: "A lease ends on its own TTL although a heartbeat for another lock keeps a shared session alive.",
		long:   true,
		run:    sharedTimer,
	},
	{
		name:   "neighbours-survive",
		clause: "A ctx that ends in the middle of a call does not end a connection that other leases live on.",
		run:    neighboursSurvive,
	},
}

// long is a TTL that does not end within a row: what is free then was freed, and did not expire.
const long = time.Minute

func exclusive(t *trial) {
	holder, _ := t.open()
	other, _ := t.open()
	key := t.key("")
	if caps := holder.Capabilities(); caps != t.caps || caps.Backend == "" {
		t.Errorf("Capabilities are %+v, and were %+v before: they name the backend and do not change", caps, t.caps)
	}
	// One holder after the other, each with a label of its own; the last has none again.
	longest := "é, \"quoted\"\nand long: "
	longest += strings.Repeat("x", locker.MaxHolderLength-len(longest))
	for _, label := range []string{"conformance: holder of exclusive", longest, ""} {
		lease := t.acquire(holder, key, ttl(long), labelled(label))
		t.pass(t.slack / 10)
		asked := time.Now()
		_, err := other.Acquire(t.ctx, t.request(key, noWait, labelled("the one who asks")))
		if !errors.Is(err, locker.ErrHeld) {
			t.Fatalf("the second request got %v, want ErrHeld", err)
		}
		held, ok := errors.AsType[*locker.HeldError](err)
		switch {
		case t.caps.Labels && label != "" && !ok, ok && held.Holder != t.told(label):
			t.Errorf("the second request got %q: the holder's label is %q, and Capabilities.Labels is %t", err, label, t.caps.Labels)
		}
		if ok && (held.Key != key || !t.plausible(held.Remaining, lease, asked)) {
			t.Errorf("the second request got %#v: the key is %q and its TTL of %v began %v ago", held, key, lease.TTL, time.Since(lease.Start))
		}
		t.release(holder, lease)
		t.mustBeFree(other, key)
	}
}

// labelled gives a request a label for people.
func labelled(label string) func(*locker.Request) {
	return func(req *locker.Request) { req.Holder = label }
}

// told is what others learn of a holder's label.
func (t *trial) told(label string) string {
	if !t.caps.Labels {
		return ""
	}
	return label
}

// plausible is true if remaining, asked for at that moment, may be what a lease has left; zero says that it is not known.
func (t *trial) plausible(remaining time.Duration, lease locker.Lease, asked time.Time) bool {
	end := lease.Start.Add(lease.TTL)
	// Its timer began between Start and the answer, and it was looked at between the question and now.
	return remaining == 0 ||
		remaining > time.Until(end)-t.caps.Granularity-t.slack/20 && remaining <= end.Sub(asked)+t.caps.Granularity+t.caps.Expiry+t.soon()
}

func exclusiveSameClient(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	refused := func(key string, ctx context.Context, change ...func(*locker.Request)) {
		req := t.request(key, append(change, ttl(long))...)
		second, err := l.Acquire(ctx, req)
		if !errors.Is(err, locker.ErrHeld) && (ctx.Err() == nil || !errors.Is(err, ctx.Err())) {
			t.Errorf("the second request got token %d and %v, want ErrHeld", second.Token, err)
		}
		if err := l.Release(t.ctx, locker.Lease{Key: key, ID: req.ID}); err != nil {
			t.Errorf("cleaning up after the second request: %v", err)
		}
		t.mustBeHeld(observer, key)
	}

	key := t.key("in turn")
	lease := t.acquire(l, key, ttl(long))
	refused(key, t.ctx, noWait)
	ctx, cancel := t.timeout(t.slack)
	defer cancel()
	refused(key, ctx)
	t.release(l, lease)
	t.mustBeFree(observer, key)

	t.parallel(20, func(i int) {
		key := t.key(fmt.Sprint("at once ", i))
		var leases [2]locker.Lease
		var errs [2]error
		var both sync.WaitGroup
		for i := range leases {
			req := t.request(key, noWait, ttl(long))
			both.Go(func() {
				if leases[i], errs[i] = l.Acquire(t.ctx, req); errs[i] != nil {
					leases[i] = locker.Lease{Key: key, ID: req.ID}
				}
			})
		}
		both.Wait()
		winner := slices.Index(errs[:], nil)
		if winner < 0 || !errors.Is(errs[1-winner], locker.ErrHeld) {
			t.Fatalf("two requests at once got %v and %v, want one grant and one ErrHeld", errs[0], errs[1])
		}
		t.release(l, leases[1-winner])
		t.mustBeHeld(observer, key)
		t.release(l, leases[winner])
		t.mustBeFree(observer, key)
	})
}

func oneReleaseFrees(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	key := t.key("")
	for range 100 {
		t.release(l, t.acquire(l, key, ttl(long)))
		t.mustBeFree(observer, key)
	}
}

func keysAreIndependent(t *trial) {
	l, _ := t.open()
	observer, _ := t.open()
	for what, key := range map[string]string{
		"an empty key": "", "a key that is too long": strings.Repeat("k", locker.MaxKeyLength+1),
		"a key with a NUL": t.key("k\x00"), "a key that is not UTF-8": t.key("k\xff"),
	} {
		if lease, err := l.Acquire(t.ctx, t.request(key, noWait)); err == nil || errors.Is(err, locker.ErrHeld) {
			t.Errorf("%s: got token %d and %v, want an error that refuses it", what, lease.Token, err)
		} else {
			t.wrapped(err)
		}
	}

	longest := t.key(strings.Repeat("k", locker.MaxKeyLength-len(t.key(""))))
	keys := []string{longest, longest[:len(longest)-1] + "l", longest[:len(longest)-1]}
	for _, suffix := range []string{
		"", "k", "K", "l", "kk", "k ", " k", "k\n", "k/", "/k", "k/k", "k:", "k:k", "k.k", "k*", "k?", "k%", "k%6b", `k\`, `k'`, "k;",
		"{k}", "{k", "k}", "{}", "{k}{k}", "k{k}", "é", "e\u0301", "É", "ﬀ", "ff", "ı", "i", "I",
		"plumless", "buckeroo", // have the same CRC-32
	} {
		keys = append(keys, t.key(suffix))
	}
	leases := make([]locker.Lease, len(keys))
	for i, key := range keys {
		leases[i] = t.acquire(l, key, ttl(long))
	}
	for i, key := range keys {
		t.mustBeHeld(observer, key)
		t.release(l, leases[i])
		t.mustBeFree(observer, key)
	}

	// Random keys, and for each a neighbour that differs in the last byte. All are held before the first neighbour is
	// tried, and stay held until the last was.
	const many = 1000
	random := make([]locker.Lease, many)
	t.parallel(many, func(i int) { random[i] = t.acquire(l, t.key(word(16)+"a"), ttl(long)) })
	t.parallel(many, func(i int) { t.mustBeFree(observer, strings.TrimSuffix(random[i].Key, "a")+"b") })
	t.parallel(many, func(i int) { t.release(l, random[i]) })
}

func acquireCtxIsNotTheHold(t *trial) {
	client, _ := t.client()
	observer, _ := t.open()
	const wait = 300 * time.Millisecond
	timed, stop := t.timeout(wait)
	defer stop()
	cancelled, cancel := context.WithCancel(t.ctx)
	defer cancel()
	began := time.Now()
	var locks []*locker.Lock
	for i, ctx := range []context.Context{timed, cancelled} {
		lock, err := client.Acquire(ctx, t.key(fmt.Sprint(i)))
		if err != nil {
			t.Fatalf("acquire: %v", err)
		}
		locks = append(locks, lock)
	}
	cancel()
	for time.Since(began) < wait+2*t.TTL {
		for _, lock := range locks {
			t.mustBeHeld(observer, lock.Key())
			if err := lock.Err(); err != nil {
				t.Fatalf("the lock ended %v after its Acquire, whose ctx ended after %v at most: %v", time.Since(began), wait, err)
			}
		}
		t.pass(t.TTL / 10)
	}
	for _, lock := range locks {
		if err := lock.Release(t.ctx); err != nil {
			t.Errorf("release: %v", err)
		}
	}
}

func ttlPerCall(t *trial) {
	observer, _ := t.open()
	l, _ := t.open()
	for _, d := range []time.Duration{0, -time.Second, locker.MaxTTL + 1} {
		if _, err := l.Acquire(t.ctx, t.request(t.key("bad"), noWait, ttl(d))); err == nil || errors.Is(err, locker.ErrHeld) {
			t.Errorf("a TTL of %v: got %v, want an error that refuses it", d, err)
		}
	}
	longest := t.acquire(l, t.key("longest"), ttl(locker.MaxTTL))

	// The shortest, one below the least that is granted, and one between two steps.
	step := max(t.caps.Granularity, 1)
	raised := []time.Duration{locker.MinTTL, max(locker.MinTTL, t.caps.MinTTL/2), t.TTL + t.caps.Granularity/2 + 1}
	t.parallel(len(raised), func(i int) {
		d := raised[i]
		lease := t.acquire(l, t.key(fmt.Sprint("raised ", i)), ttl(d), noExtend)
		if want := max(d, t.caps.MinTTL); lease.TTL < want || lease.TTL >= want+step || lease.TTL%step != 0 {
			t.Errorf("requested %v, granted %v: the least is %v, and the step is %v", d, lease.TTL, t.caps.MinTTL, t.caps.Granularity)
		}
		t.expires(observer, lease)
	})

	// The second TTL counts, whether the first one was longer or shorter.
	ttls := [][2]time.Duration{{2 * t.TTL, t.TTL}, {t.TTL, 2 * t.TTL}}
	t.parallel(len(ttls), func(i int) {
		first, second := ttls[i][0], ttls[i][1]
		key := t.key(fmt.Sprintf("%v then %v", first, second))
		t.release(l, t.acquire(l, key, ttl(first), noExtend))
		lease := t.acquire(l, key, ttl(second), noExtend)
		if holding := t.inspect(observer, key); holding.Remaining > lease.TTL || lease.TTL < second {
			t.Errorf("requested %v after %v: granted %v, of which the server has %v left", second, first, lease.TTL, holding.Remaining)
		}
		t.expires(observer, lease)
	})
	t.undisturbed(l, longest) // and has not become a short one on its way
}

func holderDies(t *trial) {
	observer, _ := t.open()
	key := t.key("")
	child := t.child()
	deadline := child.acquire(key, t.TTL).Deadline
	t.mustBeHeld(observer, key)
	child.kill()
	lease, granted := t.freeWithin(observer, key, time.Now(), t.freed())
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 && granted.Before(deadline) {
		t.Errorf("the key of the dead process was free %v before the process would have stopped trusting it", deadline.Sub(granted))
	}
	t.release(observer, lease)
}

func sharedTimer(t *trial) {
	for _, ttls := range [][2]time.Duration{{t.TTL, t.TTL}, {2 * t.TTL, t.TTL}, {t.TTL, 2 * t.TTL}} {
		l, _ := t.open()
		observer, _ := t.open()
		name := fmt.Sprintf("%v beside %v, ", ttls[0], ttls[1])
		neighbour := t.acquire(l, t.key(name+"extended"), ttl(ttls[1]))
		abandoned := []locker.Lease{
			t.acquire(l, t.key(name+"not extended"), ttl(ttls[0])),
			t.acquire(l, t.key(name+"not to be extended"), ttl(ttls[0]), noExtend),
		}
		over := time.Now().Add(ttls[0] + t.TTL)
		t.spawn(func() {
			for time.Now().Before(over) {
				t.pass(ttls[1] / 4)
				fresh, err := l.Extend(t.ctx, neighbour)
				if err != nil {
					t.Fatalf("%s: %v", neighbour.Key, err)
				}
				neighbour = fresh
			}
			t.mustBeHeld(observer, neighbour.Key)
			t.release(l, neighbour)
		})
		for _, lease := range abandoned {
			t.spawn(func() { t.expires(observer, lease) })
		}
	}
	t.spawned.Wait()
}

func neighboursSurvive(t *trial) {
	l, net := t.open()
	observer, _ := t.open()
	const delay = 50 * time.Millisecond
	neighbours := make([]locker.Lease, 200)
	t.parallel(len(neighbours), func(i int) {
		neighbours[i] = t.acquire(l, t.key(fmt.Sprint(i)), ttl(long))
	})

	net.Delay(delay, delay)
	interrupt := func(what string, call func(ctx context.Context) error) {
		ctx, cancel := t.timeout(delay / 2)
		defer cancel()
		if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s with a ctx of %v on a link of %v got %v, want DeadlineExceeded", what, delay/2, 2*delay, err)
		}
	}
	t.parallel(5, func(i int) {
		req := t.request(t.key("interrupted "+fmt.Sprint(i)), noWait, ttl(long)) // on the neighbours' session, where there are some
		interrupt("Acquire", func(ctx context.Context) error { _, err := l.Acquire(ctx, req); return err })
		interrupt("Release", func(ctx context.Context) error { return l.Release(ctx, locker.Lease{Key: req.Key, ID: req.ID}) })
		interrupt("Extend", func(ctx context.Context) error { _, err := l.Extend(ctx, neighbours[i]); return err })
	})
	net.Heal()

	t.parallel(len(neighbours), func(i int) {
		t.mustBeHeld(observer, neighbours[i].Key)
		if _, err := l.Extend(t.ctx, neighbours[i]); err != nil {
			t.Errorf("extending a lock that was held all the time: %v", err)
		}
		t.release(l, neighbours[i])
	})
}
