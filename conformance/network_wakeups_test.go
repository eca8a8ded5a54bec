package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// woken counts how often waiting goroutines are woken by what f does.
func woken(n *Network, f func()) int {
	count := func() int {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.wakeUps
	}
	before := count()
	f()
	return count() - before
}

func TestNetworkPacketWakesOnlyItsConnection(t *testing.T) {
	t.Parallel()
	const idle, trips = 200, 50
	e, n := newEcho(t), newNetwork(t)
	var readers sync.WaitGroup
	t.Cleanup(readers.Wait) // after the connections are closed
	for range idle {
		c := dial(t, n, e)
		t.Cleanup(func() { _ = c.Close() })
		send(t, c, "here")
		expect(t, c, "here")
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		readers.Go(func() { _, _ = c.Read(make([]byte, 1)) }) // until the end
	}
	busy := dial(t, n, e)
	times := woken(n, func() {
		for range trips {
			send(t, busy, "ping")
			expect(t, busy, "ping")
		}
	})
	if times > 10*trips {
		t.Errorf("%d round trips on one of %d connections have woken goroutines %d times", trips, idle+1, times)
	}
}

func TestWrapCallWakesNoOther(t *testing.T) {
	t.Parallel()
	const waiting, calls = 200, 50
	f, n := newFake(), newNetwork(t)
	l := n.Wrap(f)
	lease := acquireFake(t, l)
	ctx, cancel := context.WithCancel(t.Context())
	var waits sync.WaitGroup
	t.Cleanup(waits.Wait)
	t.Cleanup(cancel)
	for i := range waiting {
		waits.Go(func() { _, _ = l.Acquire(ctx, ask(fmt.Sprint(i))) }) // until the end
	}
	within(t, "all wait at the server", func() bool { return n.Stats().Requests == waiting+1 })
	times := woken(n, func() {
		for range calls {
			if _, err := l.Extend(t.Context(), lease); err != nil {
				t.Error(err)
			}
			short, end := context.WithTimeout(t.Context(), time.Millisecond)
			if _, err := l.Acquire(short, ask("late")); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want DeadlineExceeded", err)
			}
			end()
		}
	})
	if times > 10*calls {
		t.Errorf("%d calls beside %d that wait have woken goroutines %d times", 2*calls, waiting, times)
	}
}
