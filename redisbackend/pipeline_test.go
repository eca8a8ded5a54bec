package redisbackend

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
)

// wire is a hook that counts what a client sends, and holds it up.
type wire struct {
	sends, commands atomic.Int64
	before          func() error
}

func (w *wire) DialHook(next redis.DialHook) redis.DialHook { return next }

func (w *wire) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		w.sends.Add(1)
		w.commands.Add(1)
		if w.before != nil {
			if err := w.before(); err != nil {
				cmd.SetErr(err)
				return err
			}
		}
		return next(ctx, cmd)
	}
}

func (w *wire) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		w.sends.Add(1)
		w.commands.Add(int64(len(cmds)))
		if w.before != nil {
			if err := w.before(); err != nil {
				return err
			}
		}
		return next(ctx, cmds)
	}
}

// wired opens a Backend whose client has the hook.
func wired(t *testing.T, own bool, settings redis.Options) (*Backend, *wire) {
	t.Helper()
	server := servertest.Redis(t, servertest.RedisOptions{Private: true})
	settings.Addr, settings.ContextTimeoutEnabled = server.Addr, true
	client := redis.NewClient(&settings)
	closeClient := client.Close
	if !own {
		t.Cleanup(func() { _ = client.Close() })
		closeClient = nil
	}
	b, err := newBackend(t.Context(), client, closeClient, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	w := &wire{}
	client.AddHook(w)
	return b, w
}

func request(key string) locker.Request {
	return locker.Request{Key: key, ID: uuid.NewString(), TTL: time.Minute, NoWait: true}
}

// Many locks of one client cost no goroutine each, little memory, and their heartbeats few round trips.
func TestManyLocks(t *testing.T) {
	b, w := wired(t, true, redis.Options{})
	const n = 5000
	leases := make([]locker.Lease, n)
	goroutines, memory := runtime.NumGoroutine(), heap()
	for i := range leases {
		req := request(uuid.NewString())
		req.Lost = func(locker.Reason) {}
		var err error
		if leases[i], err = b.Acquire(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if more := runtime.NumGoroutine() - goroutines; more > 10 {
		t.Errorf("%d locks cost %d goroutines", n, more)
	}
	// Keys and IDs, which the caller has too, are in it: 100 bytes.
	each := (heap() - memory) / n
	t.Logf("each lock costs %d bytes", each)
	if each > 350 {
		t.Errorf("each lock costs %d bytes", each)
	}

	w.sends.Store(0)
	var group sync.WaitGroup
	for i := range leases {
		group.Go(func() {
			if _, err := b.Extend(t.Context(), leases[i]); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	t.Logf("%d heartbeats went out in %d sends", n, w.sends.Load())
	if sends := w.sends.Load(); sends > n/10 {
		t.Errorf("%d heartbeats went out in %d sends", n, sends)
	}
	runtime.KeepAlive(leases)
}

func heap() int {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}

func TestHungConnectionHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	for _, own := range []bool{true, false} {
		b, w := wired(t, own, redis.Options{})
		if _, err := b.Acquire(t.Context(), request("first")); err != nil {
			t.Fatal(err)
		}
		heal := make(chan struct{})
		var hung atomic.Int64
		w.before = func() error {
			if hung.Add(1) <= 3 {
				<-heal
			}
			return nil
		}
		var group sync.WaitGroup
		for n := range int64(3) { // and these connections hang
			group.Go(func() { _, _ = b.Inspect(t.Context(), "k") })
			for hung.Load() == n {
				time.Sleep(time.Millisecond)
			}
		}
		begun := time.Now()
		if _, err := b.Acquire(t.Context(), request("k")); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > 100*time.Millisecond {
			t.Errorf("own %v: a call beside three that hang took %v", own, took)
		}
		close(heal)
		group.Wait()
	}
}

// In an ordered pipeline a call that comes while another is under way follows it on the same connection, if it is answered soon.
func TestOrderedCallsDoNotOvertake(t *testing.T) {
	t.Parallel()
	b, w := wired(t, true, redis.Options{})
	p := b.calls.(*pipeline)
	p.ordered = true
	begun, answer := make(chan struct{}, 8), make(chan struct{})
	w.before = func() error {
		begun <- struct{}{}
		<-answer
		return nil
	}
	answers := make(chan *call, 2)
	post := func(key string) *call {
		c := &call{script: inspectScript, key: key, to: answers, deadline: time.Now().Add(time.Minute)}
		p.post(c)
		return c
	}
	first := post("locker:{first}")
	<-begun
	p.mu.Lock()
	p.latest = time.Now().Add(time.Minute) // it has just been sent, however slow this test is
	p.mu.Unlock()
	second := post("locker:{second}")
	p.mu.Lock()
	if p.active != 1 || len(p.queue) != 1 {
		t.Errorf("%d batches are under way and %d calls wait, want one each", p.active, len(p.queue))
	}
	p.mu.Unlock()
	close(answer)
	for _, want := range []*call{first, second} {
		if c := <-answers; c != want || c.err != nil {
			t.Errorf("%s was answered, %v, want %s", c.key, c.err, want.key)
		}
	}
}

func TestCancelledCallIsNotSent(t *testing.T) {
	t.Parallel()
	b, w := wired(t, false, redis.Options{PoolSize: 1})
	if _, err := b.Inspect(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	w.commands.Store(0)
	heal, entered := make(chan struct{}), make(chan struct{}, 10)
	w.before = func() error {
		entered <- struct{}{}
		<-heal
		return nil
	}
	var group sync.WaitGroup
	group.Go(func() { _, _ = b.Inspect(t.Context(), "k") })
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	group.Go(func() {
		if _, err := b.Acquire(ctx, request("k")); !errors.Is(err, context.Canceled) {
			t.Errorf("a cancelled call says %v", err)
		}
	})
	for queued := 0; queued == 0; {
		b.calls.(*pipeline).mu.Lock()
		queued = len(b.calls.(*pipeline).queue)
		b.calls.(*pipeline).mu.Unlock()
	}
	cancel()
	for queued := 1; queued > 0; {
		b.calls.(*pipeline).mu.Lock()
		queued = len(b.calls.(*pipeline).queue)
		b.calls.(*pipeline).mu.Unlock()
	}
	close(heal)
	group.Wait()
	if n := w.commands.Load(); n != 1 {
		t.Errorf("%d calls were sent, want 1", n)
	}
	if _, err := b.Acquire(ctx, request("k")); !errors.Is(err, context.Canceled) || w.commands.Load() != 1 {
		t.Errorf("a call with an ended ctx: %v", err)
	}
}

// A call returns with its ctx, whether a worker makes it or its own goroutine.
func TestCancelledCallReturns(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{Private: true})
	opened, err := locker.OpenLocker(t.Context(), server.URL, locker.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	b := opened.(*Backend)
	for range 2 {
		if _, err := b.Inspect(t.Context(), "k"); err != nil {
			t.Fatal(err)
		}
	}
	b.calls.(*pipeline).mu.Lock()
	if !b.calls.(*pipeline).fast {
		t.Error("calls are not made directly")
	}
	b.calls.(*pipeline).mu.Unlock()
	if err := server.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for want, end := range map[error]func() (context.Context, context.CancelFunc){
			context.Canceled: func() (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(50*time.Millisecond, cancel)
				return ctx, cancel
			},
			context.DeadlineExceeded: func() (context.Context, context.CancelFunc) {
				return context.WithTimeout(t.Context(), 50*time.Millisecond)
			},
		} {
			ctx, cancel := end()
			begun := time.Now()
			_, err := b.Acquire(ctx, request("k"))
			if took := time.Since(begun); !errors.Is(err, want) || took > 150*time.Millisecond {
				t.Errorf("after %v: %v, want %v", took, err, want)
			}
			cancel()
		}
	}
	if err := server.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// go-redis leaves the commands of a pipeline without an error when there is no connection.
// A call that was offered went out with another one. Its caller gave up, so it is not sent again when that one hangs.
func TestOfferedCallIsDropped(t *testing.T) {
	b, w := wired(t, true, redis.Options{})
	p := b.calls.(*pipeline)
	offered := b.inspection("k")
	offered.done = make(chan struct{})
	p.mu.Lock()
	p.fast, p.queue = true, append(p.queue, offered)
	p.mu.Unlock()
	hung := make(chan struct{})
	w.before = sync.OnceValue(func() error {
		close(hung)
		time.Sleep(directPatience)
		return context.DeadlineExceeded
	})
	direct := make(chan bool)
	go func() { direct <- p.direct(t.Context(), b.inspection("other")) }()
	<-hung
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.finish(gone, offered); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	if <-direct {
		t.Error("a call that hung has a result")
	}
	w.before = nil
	if err := p.do(t.Context(), b.inspection("third")); err != nil { // goes out with whatever is left
		t.Error(err)
	}
	<-offered.done
	if offered.sent != 1 {
		t.Errorf("the offered call was sent %d times", offered.sent)
	}
}

func TestNoConnection(t *testing.T) {
	t.Parallel()
	b, w := wired(t, false, redis.Options{PoolSize: 2})
	w.before = func() error {
		time.Sleep(time.Millisecond) // as a dial does: meanwhile others queue
		return net.ErrClosed
	}
	var group sync.WaitGroup
	for range 50 {
		group.Go(func() {
			if _, err := b.Acquire(t.Context(), request("k")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("without a connection: %v", err)
			}
		})
	}
	group.Wait()
	if w.commands.Load() == w.sends.Load() {
		t.Error("no pipeline was tried")
	}
}

func TestUnknownScriptsInAPipeline(t *testing.T) {
	t.Parallel()
	b, w := wired(t, false, redis.Options{PoolSize: 2})
	if err := b.calls.(*pipeline).client.ScriptFlush(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() {
			req := request(uuid.NewString())
			lease, err := b.Acquire(t.Context(), req)
			if err == nil {
				err = b.Release(t.Context(), lease)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if w.commands.Load() == w.sends.Load() {
		t.Error("no pipeline was tried")
	}
}
