package redisbackend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
	"github.com/fec20105/locker/redisbackend"
)

func TestWaitersAreServedInOrder(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder := open(t, server.URL)
	held := acquire(t, holder, request("k"))
	var answers []<-chan answer
	var lockers []*redisbackend.Backend
	for i := range 5 {
		lockers = append(lockers, open(t, server.URL))
		answers = append(answers, wait(t.Context(), t, lockers[i], request("k"), i+1))
	}
	released := time.Now()
	release(t, holder, held)
	for i := range answers {
		a := granted(t, answers[i], 5*time.Second)
		if took := a.at.Sub(released); took > time.Second {
			t.Errorf("waiter %d was granted after %v: a wake-up is missing", i, took)
		}
		if _, err := holder.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
			t.Errorf("the lock of waiter %d is free for others: %v", i, err)
		}
		for j, later := range answers[i+1:] {
			if len(later) > 0 {
				t.Fatalf("waiter %d was granted while %d holds", i+1+j, i)
			}
		}
		released = time.Now()
		release(t, lockers[i], a.lease)
	}
}

func TestNewcomersDoNotOvertake(t *testing.T) {
	t.Parallel()
	server := start(t)
	net := conformance.NewNetwork()
	defer net.Close()
	holder, waiter := open(t, server.URL), openConfig(t, server.URL, locker.Config{Dial: net.DialContext})
	held := acquire(t, holder, request("k"))
	waiting := wait(t.Context(), t, waiter, request("k"), 1)
	net.Delay(50*time.Millisecond, 0) // it hears of its turn at once, and comes late
	release(t, holder, held)
	if lease, err := holder.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a newcomer gets %v, %v before the waiter", lease, err)
	}
	held = granted(t, waiting, 2*time.Second).lease

	// The same when the lock is taken away.
	net.Heal()
	waiting = wait(t.Context(), t, waiter, request("k"), 1)
	time.Sleep(3 * 300 * time.Millisecond) // after its poll, so that only the time of the Break says that it has been woken
	net.Delay(50*time.Millisecond, 0)
	if err := holder.Break(t.Context(), locker.Holding{Key: "k", Token: held.Token}); err != nil {
		t.Fatal(err)
	}
	if lease, err := holder.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a newcomer gets %v, %v before the waiter", lease, err)
	}
	granted(t, waiting, 2*time.Second)
}

// Inspect counts those who wait, and neither the dead nor what the queue notes of its own.
func TestInspectCountsTheLiving(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, admin := open(t, server.URL), direct(t, server)
	held := acquire(t, holder, request("k"))
	ctx, stop := context.WithCancel(t.Context())
	waiting := wait(ctx, t, open(t, server.URL), request("k"), 1)
	stop() // and nobody cleans up
	<-waiting
	release(t, holder, held)
	if _, err := holder.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("a newcomer gets %v before the waiter, who has just been woken", err)
	}
	if n := waiters(t, holder, "k"); n != 1 {
		t.Errorf("one request waits, and Inspect counts %d", n)
	}
	long := redis.Z{Score: float64(time.Now().Add(-time.Hour).UnixMicro()), Member: admin.ZRange(t.Context(), "locker:{k}:order", 0, 0).Val()[0]}
	if err := admin.ZAdd(t.Context(), "locker:{k}:seen", long).Err(); err != nil {
		t.Fatal(err)
	}
	if n := waiters(t, holder, "k"); n != 0 {
		t.Errorf("the only waiter has died, and Inspect counts %d", n)
	}
}

func TestWithdrawalWakesTheNext(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, first, second := open(t, server.URL), open(t, server.URL), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	ctx, cancel := context.WithCancel(t.Context())
	leaving := request("k")
	left := wait(ctx, t, first, leaving, 1)
	waiting := wait(t.Context(), t, second, request("k"), 2)

	// The first is woken and gives up instead: its clean-up wakes the next.
	cancel()
	if a := <-left; !errors.Is(a.err, context.Canceled) || !errors.Is(a.err, locker.ErrHeld) {
		t.Errorf("a cancelled wait says %v, want both Canceled and ErrHeld", a.err)
	}
	release(t, holder, held)
	withdrawn := time.Now()
	release(t, first, cleanUp(leaving))
	if took := granted(t, waiting, 5*time.Second).at.Sub(withdrawn); took > 200*time.Millisecond {
		t.Errorf("granted %v after the withdrawal: the wake-up is missing", took)
	}
}

// The first leaves while the lock is held: the release wakes the one who is first then.
func TestWithdrawalOfTheFirst(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, first, second := open(t, server.URL), open(t, server.URL), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	ctx, cancel := context.WithCancel(t.Context())
	leaving := request("k")
	left := wait(ctx, t, first, leaving, 1)
	waiting := wait(t.Context(), t, second, request("k"), 2)
	subscribed(t, server.Addr, 3)
	time.Sleep(100 * time.Millisecond) // each polls once more when it has subscribed
	cancel()
	<-left
	release(t, first, cleanUp(leaving))
	released := time.Now()
	release(t, holder, held)
	if took := granted(t, waiting, 5*time.Second).at.Sub(released); took > 200*time.Millisecond {
		t.Errorf("granted %v after the release: the wake-up went to the one who had left", took)
	}
}

func TestExpiryNeedsNoMessage(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, waiter := open(t, server.URL), open(t, server.URL)
	req := request("k")
	req.TTL = 400 * time.Millisecond
	held := acquire(t, holder, req)
	a := granted(t, wait(t.Context(), t, waiter, request("k"), 1), 5*time.Second)
	ended := held.Start.Add(held.TTL)
	if late := a.at.Sub(ended); late < 0 || late > 200*time.Millisecond {
		t.Errorf("granted %v after the end of the lease", late)
	}
}

// deaf opens a Backend whose notifications get lost.
func deaf(t *testing.T, server *servertest.Server) *redisbackend.Backend {
	net := conformance.NewNetwork()
	t.Cleanup(func() { _ = net.Close() })
	net.LabelBy(func(written []byte) string {
		if bytes.Contains(written, []byte("subscribe")) {
			return "notify"
		}
		return ""
	})
	net.Cut("notify")
	return openConfig(t, server.URL, locker.Config{Dial: net.DialContext})
}

func TestLostWakeUp(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, waiter := open(t, server.URL), deaf(t, server)
	held := acquire(t, holder, request("k"))
	waiting := wait(t.Context(), t, waiter, request("k"), 1)
	release(t, holder, held)
	granted(t, waiting, waiter.Capabilities().Fallback)
}

// Those who come later pass a waiter that is not heard in its turn, but not again and again.
func TestLostWakeUpsAmongNewcomers(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, waiter := open(t, server.URL), deaf(t, server)
	held := acquire(t, holder, request("k"))
	waiting := wait(t.Context(), t, waiter, request("k"), 1)
	release(t, holder, held)
	for begun := time.Now(); len(waiting) == 0; { // a Locker that takes the lock again as soon as it has released it
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		lease, err := holder.Acquire(ctx, request("k"))
		cancel()
		if err != nil {
			break // it is the waiter's
		}
		time.Sleep(20 * time.Millisecond)
		release(t, holder, lease)
		if late := time.Since(begun); late > waiter.Capabilities().Fallback+time.Second {
			t.Fatalf("others take the lock again and again, and a waiter that was there before has waited for %v", late)
		}
	}
	granted(t, waiting, time.Second)
}

func TestDeadWaiters(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, alive := open(t, server.URL), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	for i := range 5 {
		dying, err := locker.OpenLocker(t.Context(), server.URL, locker.Config{})
		if err != nil {
			t.Fatal(err)
		}
		died := wait(t.Context(), t, dying.(*redisbackend.Backend), request("k"), i+1)
		if err := dying.Close(); err != nil { // and nobody cleans up
			t.Error(err)
		}
		if a := <-died; !errors.Is(a.err, locker.ErrClosed) {
			t.Errorf("a wait that Close ends says %v, want ErrClosed", a.err)
		}
	}
	waiting := wait(t.Context(), t, alive, request("k"), 6)
	release(t, holder, held)
	a := granted(t, waiting, alive.Capabilities().Fallback)
	release(t, alive, a.lease)
	eventually(t, "the dead are forgotten", func() bool { return waiters(t, holder, "k") == 0 })
	release(t, holder, acquire(t, holder, try("k")))
}

// A waiter that dies while the lock is kept free for others holds nobody up either.
func TestWaiterDiesInTurn(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder := open(t, server.URL)
	held := acquire(t, holder, request("k"))
	ctx, cancel := context.WithCancel(t.Context())
	first := wait(ctx, t, open(t, server.URL), request("k"), 1)
	cancel() // and nobody cleans up
	<-first
	release(t, holder, held)
	ctx, cancel = context.WithCancel(t.Context())
	second := wait(ctx, t, open(t, server.URL), request("k"), 2)
	cancel()
	<-second
	granted(t, wait(t.Context(), t, open(t, server.URL), request("k"), 3), holder.Capabilities().Fallback)
}

func TestDeletedStateKeepsTheQueue(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, first, second := open(t, server.URL), open(t, server.URL), open(t, server.URL)
	acquire(t, holder, request("k"))
	one := wait(t.Context(), t, first, request("k"), 1)
	two := wait(t.Context(), t, second, request("k"), 2)
	if err := direct(t, server).Del(t.Context(), "locker:{k}").Err(); err != nil {
		t.Fatal(err)
	}
	a := granted(t, one, 3*time.Second)
	if len(two) > 0 {
		t.Error("both waiters were granted")
	}
	release(t, first, a.lease)
	granted(t, two, 3*time.Second)
}

// A waiter that died before the clock was set back seems to have polled in the future, and the lock to become free there.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	server := start(t)
	admin, holder := direct(t, server), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	ctx, die := context.WithCancel(t.Context())
	dead := wait(ctx, t, open(t, server.URL), request("k"), 1)
	die() // and nobody cleans up
	<-dead
	waiting := wait(t.Context(), t, open(t, server.URL), request("k"), 2)
	first := admin.ZRange(t.Context(), "locker:{k}:order", 0, 0).Val()[0]
	if err := admin.ZIncrBy(t.Context(), "locker:{k}:seen", 3600e6, first).Err(); err != nil {
		t.Fatal(err)
	}
	release(t, holder, held)
	later := fmt.Sprintf("%016d", time.Now().Add(time.Hour).UnixMicro())
	if err := admin.SetRange(t.Context(), "locker:{k}", 34, later).Err(); err != nil {
		t.Fatal(err)
	}
	granted(t, waiting, holder.Capabilities().Fallback+time.Second)
}

// Who comes after the clock was set back stands behind those who came before.
func TestOrderWhenTheClockIsSetBack(t *testing.T) {
	t.Parallel()
	server := start(t)
	admin, holder := direct(t, server), open(t, server.URL)
	held := acquire(t, holder, request("k"))
	first := wait(t.Context(), t, open(t, server.URL), request("k"), 1)
	if err := admin.ZIncrBy(t.Context(), "locker:{k}:order", 3600e6, admin.ZRange(t.Context(), "locker:{k}:order", 0, 0).Val()[0]).Err(); err != nil {
		t.Fatal(err)
	}
	second := wait(t.Context(), t, open(t, server.URL), request("k"), 2)
	release(t, holder, held)
	granted(t, first, 3*time.Second)
	if len(second) > 0 {
		t.Error("both waiters were granted")
	}
}

// While the holder keeps the lock, a waiter costs the server less than a command in a second.
func TestWaitersAreQuiet(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder := open(t, server.URL)
	acquire(t, holder, request("k"))
	const n = 50
	ctx, cancel := context.WithCancel(t.Context())
	var answers []<-chan answer
	for i := range n {
		answers = append(answers, wait(ctx, t, open(t, server.URL), request("k"), i+1))
	}
	subscribed(t, server.Addr, n+1)
	time.Sleep(100 * time.Millisecond) // each polls once more when it has subscribed
	admin := direct(t, server)
	before := commands(t, admin)
	const span = 3 * time.Second
	time.Sleep(span)
	rate := float64(commands(t, admin)-before) / n / span.Seconds()
	if rate > 1 {
		t.Errorf("each waiter costs %.2f commands a second, want at most 1", rate)
	}
	t.Logf("each waiter costs %.2f commands a second", rate)
	cancel()
	for _, answered := range answers {
		<-answered
	}
}

// commands counts what clients have asked the server for; what scripts call is in addition.
func commands(t *testing.T, admin *redis.Client) (n int) {
	t.Helper()
	for line := range strings.Lines(admin.Info(t.Context(), "commandstats").Val()) {
		name, stats, _ := strings.Cut(line, ":")
		switch strings.TrimPrefix(name, "cmdstat_") {
		case "evalsha", "eval", "ping", "subscribe":
			calls, _, _ := strings.Cut(strings.TrimPrefix(stats, "calls="), ",")
			count, err := strconv.Atoi(calls)
			if err != nil {
				t.Fatal(err)
			}
			n += count
		}
	}
	return n
}

func TestWaitSurvivesABlip(t *testing.T) {
	t.Parallel()
	server := start(t)
	net := conformance.NewNetwork()
	defer net.Close()
	holder, waiter := open(t, server.URL), openConfig(t, server.URL, locker.Config{Dial: net.DialContext})
	held := acquire(t, holder, request("k"))
	waiting := wait(t.Context(), t, waiter, request("k"), 1)
	for range 10 {
		time.Sleep(20 * time.Millisecond)
		net.Reset()
	}
	release(t, holder, held)
	granted(t, waiting, waiter.Capabilities().Fallback)
}

func TestWaitEndsWithTheServer(t *testing.T) {
	t.Parallel()
	server := start(t)
	holder, waiter := open(t, server.URL), open(t, server.URL)
	acquire(t, holder, request("k"))
	waiting := wait(t.Context(), t, waiter, request("k"), 1)
	if err := server.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case a := <-waiting:
		if a.err == nil || errors.Is(a.err, context.DeadlineExceeded) {
			t.Errorf("the wait ends with %v, want an error that is no time-out of the caller", a.err)
		}
	case <-time.After(8 * time.Second):
		t.Error("the wait did not end")
	}
	if err := server.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}
