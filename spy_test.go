package locker_test

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/clock"
	"github.com/fec20105/locker/membackend"
)

// Most tests hold locks of this TTL, for which a third and a sixth are round; trust is what the margin leaves of it.
const (
	ttl   = 9 * time.Second
	trust = ttl - ttl/100 - 2*time.Millisecond
)

// spy is a Locker between a Client and a store in memory. It notes each call with its moment, lets a test decide what
// becomes of it, and watches that no release overlaps with an extend of the same lease, nor comes before one.
type spy struct {
	t     *testing.T
	store *membackend.Store
	next  locker.Locker
	made  time.Time

	mu       sync.Mutex
	calls    []call
	fates    map[string]func(n int) fate
	extends  map[string]int  // under way, by request ID
	releases map[string]bool // begun
}

type call struct {
	op    string
	at    time.Duration  // since the spy was made
	req   locker.Request // of an acquire
	lease locker.Lease   // of an extend or release
}

// A fate is what becomes of a call. It may ask the store behind, and may answer something else.
type fate func(ctx context.Context, ask func() (locker.Lease, error)) (locker.Lease, error)

var errRefused = errors.New("connection refused")

func delivered(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
	return ask()
}

// refused fails at once; the server has seen nothing.
func refused(context.Context, func() (locker.Lease, error)) (locker.Lease, error) {
	return locker.Lease{}, errRefused
}

// answers is a server that says err, whatever it was asked.
func answers(err error) fate {
	return func(context.Context, func() (locker.Lease, error)) (locker.Lease, error) {
		return locker.Lease{}, err
	}
}

// hung never reaches the server, and is not answered.
func hung(ctx context.Context, _ func() (locker.Lease, error)) (locker.Lease, error) {
	<-ctx.Done()
	return locker.Lease{}, ctx.Err()
}

// swallowed is done by the server, whose answer never comes.
func swallowed(ctx context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
	_, _ = ask()
	return hung(ctx, nil)
}

// reset is done by the server, but the connection breaks before the answer.
func reset(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
	_, _ = ask()
	return locker.Lease{}, errors.New("connection reset")
}

// travels is a link that takes its time each way, as long as ctx lasts. What it brings counts from its sending.
func travels(there, back time.Duration) fate {
	return func(ctx context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
		sent := time.Now()
		if err := sleep(ctx, there); err != nil {
			return locker.Lease{}, err
		}
		lease, err := ask()
		if late := sleep(ctx, back); late != nil {
			return locker.Lease{}, late
		}
		lease.Start = sent
		return lease, err
	}
}

// deaf travels too, but cares for no ctx.
func deaf(there, back time.Duration) fate {
	return func(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
		return travels(there, back)(context.Background(), ask)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// setup makes a Client over a spy, with locks of ttl, and closes it at the end.
func setup(t *testing.T, opts ...locker.Option) (*spy, *locker.Client) {
	t.Helper()
	s := newSpy(t)
	return s, newClient(t, s, opts...)
}

func newSpy(t *testing.T) *spy {
	store := membackend.NewStore()
	return &spy{
		t: t, store: store, next: store.Locker(), made: time.Now(),
		fates: make(map[string]func(int) fate), extends: make(map[string]int), releases: make(map[string]bool),
	}
}

func newClient(t *testing.T, l locker.Locker, opts ...locker.Option) *locker.Client {
	t.Helper()
	c, err := locker.New(l, append([]locker.Option{locker.WithTTL(ttl)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error("Close:", err)
		}
	})
	return c
}

func acquire(t *testing.T, c *locker.Client, opts ...locker.Option) *locker.Lock {
	t.Helper()
	l, err := c.Acquire(t.Context(), "k", opts...)
	if err != nil {
		t.Fatal("Acquire:", err)
	}
	return l
}

// on sets the fates of the calls of one kind from now on; they count from 1.
func (s *spy) on(op string, fates func(n int) fate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := 0
	for _, c := range s.calls {
		if c.op == op {
			seen++
		}
	}
	s.fates[op] = func(n int) fate { return fates(n - seen) }
}

func always(f fate) func(int) fate { return func(int) fate { return f } }

// first gives the first calls their fates, and delivers the rest.
func first(fates ...fate) func(int) fate {
	return func(n int) fate {
		if n <= len(fates) {
			return fates[n-1]
		}
		return delivered
	}
}

// note adds a call and decides its fate.
func (s *spy) note(c call) fate {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.at = time.Since(s.made)
	s.calls = append(s.calls, c)
	switch id := c.lease.ID; c.op {
	case "extend":
		s.extends[id]++
		if s.releases[id] {
			s.t.Errorf("at %v: an extend after a release began", c.at)
		}
	case "release":
		s.releases[id] = true
		if s.extends[id] > 0 {
			s.t.Errorf("at %v: a release overlaps with an extend", c.at)
		}
	}
	n := 0
	for _, before := range s.calls {
		if before.op == c.op {
			n++
		}
	}
	if fates := s.fates[c.op]; fates != nil {
		return fates(n)
	}
	return delivered
}

// A call whose ctx is done already sends nothing, as the contract demands.

func (s *spy) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := ctx.Err(); err != nil {
		return locker.Lease{}, err
	}
	return s.note(call{op: "acquire", req: req})(ctx, func() (locker.Lease, error) { return s.next.Acquire(ctx, req) })
}

func (s *spy) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	if err := ctx.Err(); err != nil {
		return locker.Lease{}, err
	}
	defer func() {
		s.mu.Lock()
		s.extends[lease.ID]--
		s.mu.Unlock()
	}()
	return s.note(call{op: "extend", lease: lease})(ctx, func() (locker.Lease, error) {
		return s.next.Extend(context.WithoutCancel(ctx), lease) // what is on its way arrives
	})
}

func (s *spy) Release(ctx context.Context, lease locker.Lease) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := s.note(call{op: "release", lease: lease})(ctx, func() (locker.Lease, error) {
		return lease, s.next.Release(context.WithoutCancel(ctx), lease)
	})
	return err
}

func (s *spy) Capabilities() locker.Capabilities { return s.next.Capabilities() }

func (s *spy) Close() error {
	s.note(call{op: "close"})
	return s.next.Close()
}

// seen returns the calls of one kind.
func (s *spy) seen(op string) []call {
	s.mu.Lock()
	defer s.mu.Unlock()
	var calls []call
	for _, c := range s.calls {
		if c.op == op {
			calls = append(calls, c)
		}
	}
	return calls
}

// moments tells when the calls of one kind were made.
func (s *spy) moments(op string) []time.Duration {
	var at []time.Duration
	for _, c := range s.seen(op) {
		at = append(at, c.at)
	}
	return at
}

// now is the time since the spy was made.
func (s *spy) now() time.Duration { return time.Since(s.made) }

// at sleeps until a moment counted from the making of the spy.
func (s *spy) at(moment time.Duration) { time.Sleep(moment - s.now()) }

// napping is a spy on a machine that can be suspended.
type napping struct {
	*spy
	mu    sync.Mutex
	slept time.Duration
}

func (n *napping) Clock() clock.Clock { return napClock{n} }

// suspend lets boot time run while the monotonic clock stands still.
func (n *napping) suspend(d time.Duration) {
	n.mu.Lock()
	n.slept += d
	n.mu.Unlock()
}

// nap is a fate in which the machine is suspended for a second while the server is asked.
func (n *napping) nap(_ context.Context, ask func() (locker.Lease, error)) (locker.Lease, error) {
	lease, err := ask()
	n.suspend(time.Second)
	return lease, err
}

type napClock struct{ *napping }

func (c napClock) Now() clock.Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	return clock.Reading{Mono: now, Boot: now.Sub(c.made) + c.slept}
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func seconds(s ...float64) []time.Duration {
	var d []time.Duration
	for _, s := range s {
		d = append(d, time.Duration(s*float64(time.Second)))
	}
	return d
}

// isLost checks that err tells the loss of l for that reason, to every way of asking.
func isLost(t *testing.T, err error, l *locker.Lock, reason locker.Reason) {
	t.Helper()
	lost, ok := errors.AsType[*locker.LostError](err)
	if !ok || !errors.Is(err, locker.ErrLost) || *lost != (locker.LostError{Key: l.Key(), Token: l.Token(), Reason: reason}) {
		t.Errorf("got %v, want the loss of %q with token %d: %v", err, l.Key(), l.Token(), reason)
	}
}
