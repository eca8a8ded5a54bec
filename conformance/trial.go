package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/fec20105/locker"
)

// trial is one run of one row: what a *testing.T is to a test.
//
// A row opens what it needs with open, client or child, and never closes it: at the end the trial heals all networks,
// ends ctx, waits for what was spawned, and closes everything in the reverse order of opening. It then fails if a
// connection or a goroutine is left.
//
//	var exampleRows = []row{{
//		name:   "exclusive",
//		clause: "Of two requests for a key one is granted, the other gets ErrHeld.",
//		run: func(t *trial) {
//			a, _ := t.open()
//			b, net := t.open()
//			key := t.key("")
//			lease := t.acquire(a, key)
//			if _, err := b.Acquire(t.ctx, t.request(key, noWait)); !errors.Is(err, locker.ErrHeld) {
//				t.Fatalf("the second request got %v, want ErrHeld", err)
//			}
//			...
//		},
//	}}
type trial struct {
	*suite
	row row
	id  string
	ctx context.Context // ends when the row's function has returned, and when its watchdog barks

	mu       sync.Mutex
	seen     strings.Builder
	outcome  Outcome // the worst so far
	cleanups []func()
	networks []*Network
	spawned  sync.WaitGroup
}

// Errorf records a failure; the row goes on.
func (t *trial) Errorf(format string, args ...any) { t.record(Failed, format, args...) }

// Fatalf records a failure and ends the goroutine that calls it.
func (t *trial) Fatalf(format string, args ...any) {
	t.record(Failed, format, args...)
	runtime.Goexit()
}

// Skipf says why the row makes no sense here, and ends the goroutine that calls it.
func (t *trial) Skipf(format string, args ...any) {
	t.record(Skipped, format, args...)
	runtime.Goexit()
}

// Logf records something worth reading.
func (t *trial) Logf(format string, args ...any) { t.record(Passed, format, args...) }

func (t *trial) record(outcome Outcome, format string, args ...any) {
	where := callers()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.outcome = max(t.outcome, outcome)
	fmt.Fprintf(&t.seen, "%s%s\n", where, fmt.Sprintf(format, args...))
}

// callers names the lines of the row, and of the helpers in the rows' files, that lead to the present call.
func callers() string {
	var pcs [32]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(4, pcs[:])])
	var lines []string
	for {
		frame, more := frames.Next()
		if file := filepath.Base(frame.File); strings.HasPrefix(file, "rows_") || strings.HasSuffix(file, "_test.go") {
			lines = append(lines, fmt.Sprintf("%s:%d", file, frame.Line))
		}
		if !more {
			break
		}
	}
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, " < ") + ": "
}

// cleanup calls f after the row, before what was registered earlier.
func (t *trial) cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}

// clean undoes what the row has done.
func (t *trial) clean(cancel context.CancelCauseFunc) {
	defer t.recovered()
	t.heal()
	cancel(context.Canceled)
	t.spawned.Wait()
	for {
		t.mu.Lock()
		if len(t.cleanups) == 0 {
			t.mu.Unlock()
			return
		}
		last := t.cleanups[len(t.cleanups)-1]
		t.cleanups = t.cleanups[:len(t.cleanups)-1]
		t.mu.Unlock()
		last()
	}
}

// heal undoes the faults of all networks of the row.
func (t *trial) heal() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, net := range t.networks {
		net.Heal()
	}
}

// spawn runs f in a goroutine that the trial waits for. It must end when t.ctx does.
func (t *trial) spawn(f func()) {
	t.spawned.Go(func() {
		defer t.recovered()
		f()
	})
}

// key is a key that nobody else has; the same for the same suffix within the row.
func (t *trial) key(suffix string) string {
	return "conformance/" + t.row.name + "/" + t.id + "/" + suffix
}

// artifact is the path of a file, for people to look at after a failure.
func (t *trial) artifact(name string) string {
	folder := t.Artifacts
	if folder == "" {
		folder = os.TempDir()
	}
	return filepath.Join(folder, fmt.Sprintf("locker-%s-%s-%s", t.row.name, t.id, name))
}

// expire makes the server forget a lease, for rows with needExpire.
func (t *trial) expire(lease locker.Lease) {
	t.outside("Expire", func(ctx context.Context) error { return t.Expire(ctx, lease) })
}

// outside calls a function of the harness, such as t.Server.Crash. The goroutines that it starts are not the row's.
func (t *trial) outside(what string, f func(context.Context) error) {
	pprof.SetGoroutineLabels(context.Background())
	defer pprof.SetGoroutineLabels(t.ctx)
	if err := f(t.ctx); err != nil {
		t.Fatalf("the harness's %s: %v", what, err)
	}
}

// network is a link of its own, for open.
func (t *trial) network() *Network {
	net := NewNetwork()
	t.mu.Lock()
	t.networks = append(t.networks, net)
	t.mu.Unlock()
	t.cleanup(func() {
		if !poll(20*t.slack, func() bool { return net.Stats().Open == 0 }) {
			t.Errorf("%d connections are open after Close", net.Stats().Open)
		}
		if err := net.Close(); err != nil {
			t.Errorf("closing a Network after the row: %v", err)
		}
	})
	return net
}

// open makes a Locker on a link of its own, as another process would.
func (t *trial) open() (locker.Locker, *Network) {
	net := t.network()
	l, err := t.Open(t.ctx, net)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("closing a Locker after the row: %v", err)
		}
	})
	return l, net
}

// client makes a Client over a Locker of its own, with the suite's TTL unless opts say otherwise.
func (t *trial) client(opts ...locker.Option) (*locker.Client, *Network) {
	l, net := t.open()
	return t.clientOf(l, opts...), net
}

// clientOf makes a Client over l.
func (t *trial) clientOf(l locker.Locker, opts ...locker.Option) *locker.Client {
	client, err := locker.New(l, append([]locker.Option{locker.WithTTL(t.TTL)}, opts...)...)
	if err != nil {
		t.Fatalf("making a Client: %v", err)
	}
	t.cleanup(func() {
		if err := client.Close(); err != nil {
			t.Errorf("closing a Client after the row: %v", err)
		}
	})
	return client
}

// request asks for key with the suite's TTL; change the fields that matter.
func (t *trial) request(key string, change ...func(*locker.Request)) locker.Request {
	req := locker.Request{Key: key, ID: uuid.Must(uuid.NewV7()).String(), TTL: t.TTL}
	for _, f := range change {
		f(&req)
	}
	return req
}

// noWait makes a request ask once.
func noWait(req *locker.Request) { req.NoWait = true }

// ttl makes a request ask for d.
func ttl(d time.Duration) func(*locker.Request) {
	return func(req *locker.Request) { req.TTL = d }
}

// acquire gets a key that must be free, or fails the row.
func (t *trial) acquire(l locker.Locker, key string, change ...func(*locker.Request)) locker.Lease {
	req := t.request(key, append(change, noWait)...)
	lease, err := l.Acquire(t.ctx, req)
	if err != nil {
		t.Fatalf("acquire %q, which is free: %v", key, err)
	}
	t.answers(req, lease)
	return lease
}

// answers fails the row if a grant is not one of the request, or counts from the future.
func (t *trial) answers(req locker.Request, lease locker.Lease) {
	if lease.Key != req.Key || lease.ID != req.ID || lease.Holder != req.Holder || lease.Token == 0 || lease.TTL < req.TTL || lease.Start.After(time.Now()) {
		t.Errorf("the request %+v was granted as %+v", req, lease)
	}
}

// wrapped fails the row if an error that is none of the contract's facts does not tell the call in an *Error.
func (t *trial) wrapped(err error) {
	if wrapper, ok := errors.AsType[*locker.Error](err); !ok || wrapper.Op == "" || wrapper.Backend == "" {
		t.Errorf("%v (%T) is no *locker.Error that names the call and the backend", err, err)
	}
}

// release gives up a lease that must still be held, or fails the row.
func (t *trial) release(l locker.Locker, lease locker.Lease) {
	if err := l.Release(t.ctx, lease); err != nil {
		t.Errorf("release %q, which is held: %v", lease.Key, err)
	}
}

// mustBeHeld fails the row if the observer can have the key.
func (t *trial) mustBeHeld(observer locker.Locker, key string) {
	if lease, held := t.try(observer, key); !held {
		t.Errorf("%q is free (granted with token %d), but should be held", key, lease.Token)
		t.release(observer, lease)
	}
}

// mustBeFree fails the row if the observer cannot have the key now. The key is free again afterwards.
func (t *trial) mustBeFree(observer locker.Locker, key string) {
	if lease, held := t.try(observer, key); held {
		t.Errorf("%q is held, but should be free", key)
	} else {
		t.release(observer, lease)
	}
}

// freeWithin polls until the observer is granted the key, and fails the row if that takes longer than d from the
// moment since. It returns the grant, which is still held, and the moment at which it was answered.
func (t *trial) freeWithin(
	observer locker.Locker, key string, since time.Time, d time.Duration, change ...func(*locker.Request),
) (lease locker.Lease, granted time.Time) {
	if !poll(time.Until(since.Add(d)), func() bool {
		var held bool
		lease, held = t.try(observer, key, change...)
		granted = time.Now()
		return !held
	}) {
		t.Fatalf("%q is still held after %v; the limit is %v", key, time.Since(since).Round(time.Millisecond), d)
	}
	return lease, granted
}

// try asks once for the key; any answer but a grant and ErrHeld fails the row.
func (t *trial) try(l locker.Locker, key string, change ...func(*locker.Request)) (lease locker.Lease, held bool) {
	lease, err := l.Acquire(t.ctx, t.request(key, append(change, noWait)...))
	if err != nil && !errors.Is(err, locker.ErrHeld) {
		t.Fatalf("asking once for %q: %v", key, err)
	}
	return lease, err != nil
}

// margin is what a Client takes off the deadline.
func (t *trial) margin() time.Duration { return t.TTL/100 + 2*time.Millisecond }

// freed is the time from a lease's Start by which an abandoned key must be free: T + G + X + s.
func (t *trial) freed() time.Duration {
	return t.TTL + t.caps.Granularity + t.caps.Expiry + t.slack
}

// timeout is a context for a call that must not wait longer than d.
func (t *trial) timeout(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.ctx, d)
}

// eventually polls until cond is true, and fails the row if it is not within d.
func (t *trial) eventually(d time.Duration, what string, cond func() bool) {
	if !poll(d, cond) {
		t.Fatalf("after %v still not true: %s", d, what)
	}
}

// pass lets time pass: for rows about the clock, never to wait for somebody.
func (t *trial) pass(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.ctx.Done():
		t.Fatalf("the row was ended: %v", context.Cause(t.ctx))
	}
}

// poll asks cond every few milliseconds until it is true, or false although it was asked when d was over: an answer that
// was long on its way tells of the past.
func poll(d time.Duration, cond func() bool) bool {
	deadline := time.Now().Add(d)
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for {
		asked := time.Now()
		if cond() {
			return true
		}
		if asked.After(deadline) {
			return false
		}
		<-tick.C
	}
}
