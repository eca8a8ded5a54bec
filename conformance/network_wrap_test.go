package conformance

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// fake is a Locker that knows one lock and no time, and remembers what has reached it.
type fake struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced when the lock becomes free
	holder  string        // the ID; "" if free
	lost    func(locker.Reason)
	reached []string
	closed  int
}

func newFake() *fake { return &fake{changed: make(chan struct{})} }

func (f *fake) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = append(f.reached, "acquire "+req.ID)
	for f.holder != "" {
		if req.NoWait {
			return locker.Lease{}, locker.ErrHeld
		}
		changed := f.changed
		f.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		f.mu.Lock()
		if err := ctx.Err(); err != nil {
			f.reached = append(f.reached, "cancel "+req.ID)
			return locker.Lease{}, err
		}
	}
	f.holder, f.lost = req.ID, req.Lost
	return locker.Lease{Key: req.Key, ID: req.ID, TTL: req.TTL, Start: time.Now()}, nil
}

func (f *fake) Extend(_ context.Context, lease locker.Lease) (locker.Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = append(f.reached, "extend "+lease.ID)
	if f.holder != lease.ID {
		return locker.Lease{}, locker.ErrLost
	}
	lease.Start = time.Now()
	return lease, nil
}

func (f *fake) Release(_ context.Context, lease locker.Lease) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reached = append(f.reached, "release "+lease.ID)
	if f.holder != lease.ID {
		return locker.ErrLost
	}
	f.holder = ""
	close(f.changed)
	f.changed = make(chan struct{})
	return nil
}

func (f *fake) Capabilities() locker.Capabilities { return locker.Capabilities{Backend: "fake"} }

func (f *fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed++
	return nil
}

// saw is true if the fake was reached by what.
func (f *fake) saw(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.reached {
		if r == what {
			return true
		}
	}
	return false
}

func ask(id string) locker.Request { return locker.Request{Key: "key", ID: id, TTL: time.Second} }

func shortly(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func acquireFake(t *testing.T, l locker.Locker) locker.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), ask("a"))
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func TestWrapCutPassesNoRequest(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*Network){"cut": func(n *Network) { n.Cut() }, "hang": (*Network).Hang} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, n := newFake(), newNetwork(t)
			l := n.Wrap(f)
			lease := acquireFake(t, l)
			fault(n)
			_, err := l.Extend(shortly(t), lease)
			var lockerError *locker.Error
			if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &lockerError) || lockerError.Op != "extend" {
				t.Fatalf("a call over a dead link: %v; want an Error with DeadlineExceeded", err)
			}
			if f.saw("extend a") {
				t.Fatal("a request has passed a dead link")
			}
			n.Heal()
			within(t, "the request lands after Heal", func() bool { return f.saw("extend a") })
		})
	}
}

func TestWrapCallSurvivesABlip(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	lease := acquireFake(t, l)
	n.Cut()
	answer := make(chan error, 1)
	go func() {
		_, err := l.Extend(t.Context(), lease)
		answer <- err
	}()
	within(t, "the call is on its way", func() bool { return n.Stats().Requests == 2 })
	n.Heal()
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
}

func TestWrapHeldAcquireLandsLateAsOneAttempt(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	lease := acquireFake(t, l)
	n.Hold()
	if _, err := l.Acquire(shortly(t), ask("b")); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("an acquire that is held: %v; want DeadlineExceeded", err)
	}
	if f.saw("acquire b") {
		t.Fatal("a request that is held has arrived")
	}
	if err := n.Land(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !f.saw("acquire b") {
		t.Fatal("Land has returned before the request has landed")
	}
	if f.holder != "a" {
		t.Fatalf("%q holds the lock, want a", f.holder)
	}
	if err := l.Release(shortly(t), lease); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a release after Land: %v; want that it is held", err)
	}
	if err := n.Land(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.holder != "" {
		t.Fatal("the release has not landed")
	}
}

func TestWrapSwallowsTheReplyAfterTheServerHasActed(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	swallowed := n.SwallowReply()
	if _, err := l.Acquire(t.Context(), ask("a")); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("got %v, want ECONNRESET", err)
	}
	<-swallowed
	if f.holder != "a" {
		t.Fatal("the server has not acted")
	}
	next := ask("b")
	next.NoWait = true
	if _, err := l.Acquire(t.Context(), next); !errors.Is(err, locker.ErrHeld) {
		t.Fatalf("the next call: %v; want an answer", err)
	}
}

func TestWrapResetEndsWaits(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	acquireFake(t, l)
	answer := make(chan error, 1)
	go func() {
		_, err := l.Acquire(t.Context(), ask("b"))
		answer <- err
	}()
	within(t, "b waits at the server", func() bool { return f.saw("acquire b") })
	n.Reset()
	if err := <-answer; !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("the wait got %v, want ECONNRESET", err)
	}
	within(t, "the server has dropped the waiter", func() bool { return f.saw("cancel b") })
}

func TestWrapCancelCrossesALiveLink(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	acquireFake(t, l)
	if _, err := l.Acquire(shortly(t), ask("b")); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want DeadlineExceeded", err)
	}
	if !f.saw("cancel b") {
		t.Fatal("the server was not told before the call returned")
	}
}

func TestWrapWaiterThatIsCutOffGoesOnWaiting(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l, other := n.Wrap(f), newNetwork(t)
	lease := acquireFake(t, other.Wrap(f))
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error, 1)
	go func() {
		_, err := l.Acquire(ctx, ask("b"))
		answer <- err
	}()
	within(t, "b waits at the server", func() bool { return f.saw("acquire b") })
	n.Cut()
	cancel()
	if err := <-answer; !errors.Is(err, context.Canceled) {
		t.Fatalf("the waiter got %v, want Canceled", err)
	}
	if err := l.Close(); err != nil || f.closed != 0 {
		t.Fatalf("Close over a cut link: %v, and the server has seen it %d times", err, f.closed)
	}
	if err := other.Wrap(f).Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	within(t, "the dead waiter inherits", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.holder == "b"
	})
	if err := n.Close(); err != nil || f.closed != 1 {
		t.Fatalf("the Network's Close: %v, and it has closed the backend %d times", err, f.closed)
	}
}

func TestWrapStartIsThatOfTheSending(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	n.Delay(60*time.Millisecond, 60*time.Millisecond)
	l := n.Wrap(f)
	sent := time.Now()
	lease := acquireFake(t, l)
	if took := time.Since(sent); took < 120*time.Millisecond {
		t.Fatalf("the call took %v, want 120 ms", took)
	}
	if late := lease.Start.Sub(sent); late < 0 || late > 50*time.Millisecond {
		t.Fatalf("Start is %v after the sending, want next to nothing", late)
	}
}

func TestWrapLostCrossesTheLink(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	told := make(chan locker.Reason, 1)
	req := ask("a")
	req.Lost = func(r locker.Reason) { told <- r }
	if _, err := l.Acquire(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	n.Cut()
	f.lost(locker.ReasonTaken)
	if poll(50*time.Millisecond, func() bool { return len(told) > 0 }) {
		t.Fatal("the news of a loss has passed a cut link")
	}
	n.Heal()
	if r := <-told; r != locker.ReasonTaken {
		t.Fatalf("told %v, want taken", r)
	}
}

func TestWrapContextThatIsDoneIsTheBackendsOwnMatter(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = n.Wrap(f).Acquire(ctx, ask("a"))
	if n.Stats().Requests != 0 || !f.saw("acquire a") {
		t.Fatal("want that the backend decides, and nothing is counted")
	}
}

func TestWrapUnwraps(t *testing.T) {
	t.Parallel()
	f, n := newFake(), newNetwork(t)
	if got, ok := locker.As[*fake](n.Wrap(f)); !ok || got != f {
		t.Fatal("As does not find the backend")
	}
}
