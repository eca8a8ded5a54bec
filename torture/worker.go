package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/clock"
)

// workerJob makes this program a worker: its value is a job.
const workerJob = "LOCKER_TORTURE_JOB"

// job is what a worker does.
type job struct {
	URL          string
	Worker, Life int
	Seed         uint64
	Epoch        time.Duration // the beginning of the run
	Keys         []string
	TTL          time.Duration
	Broken       string // the name of a deliberately broken locker, or ""
}

// order is a line that a worker gets: a fault of its link, a change of pace, or the answer to a look or a write.
type order struct {
	Do       string        `json:",omitempty"`
	Up, Down time.Duration `json:",omitempty"` // of a delay
	Ask      int           `json:",omitempty"`
	Base     bases         `json:",omitzero"`
	Refused  bool          `json:",omitempty"`
}

// The orders that are no faults of the link.
const (
	doAnswer = "answer"
	doCalm   = "calm" // no faults, and no long holds
	doChaos  = "chaos"
	doStop   = "stop"
)

// hands is how many locks a worker uses at the same time.
const hands = 2

// worker is a process that uses locks.
type worker struct {
	job
	clock  clock.Clock
	net    *conformance.Network
	client *locker.Client
	locks  atomic.Int64

	mu      sync.Mutex
	out     *json.Encoder
	asks    int
	answers map[int]chan order
	calm    bool
	calmed  chan struct{} // closed while it is calm
}

// work is the life of a worker. It ends when it is told to, and at once when who started it is gone.
func work(text string, in io.Reader, out io.Writer) error {
	w := &worker{clock: clock.System(), out: json.NewEncoder(out), answers: make(map[int]chan order), calmed: make(chan struct{})}
	if err := json.Unmarshal([]byte(text), &w.job); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	w.net = conformance.NewNetwork()
	go w.obey(in, stop)
	idle := runtime.NumGoroutine()
	l, err := w.open(ctx)
	if err != nil {
		return err
	}
	w.client, err = locker.New(breakIt(w.Broken, l), locker.WithTTL(w.TTL), locker.WithReleaseTimeout(w.TTL),
		locker.WithHolder(fmt.Sprintf("torture worker %d.%d", w.Worker, w.Life)))
	if err != nil {
		return err
	}
	w.say(event{Kind: kindReady, At: w.now()})
	var work sync.WaitGroup
	for hand := range hands {
		luck := rand.New(rand.NewPCG(w.Seed, uint64(w.Worker<<32|w.Life<<8|hand)))
		work.Go(func() {
			for ctx.Err() == nil {
				w.use(ctx, luck)
			}
		})
	}
	work.Wait()
	if err := errors.Join(w.client.Close(), l.Close()); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	bye := event{Kind: kindBye, Leaked: w.net.Stats().Open}
	if err := w.net.Close(); err != nil {
		return err
	}
	bye.Text = leftGoroutines(idle)
	bye.At = w.now()
	w.say(bye)
	return nil
}

// open reaches the server, which may be down at the moment.
func (w *worker) open(ctx context.Context) (locker.Locker, error) {
	for {
		l, err := open(ctx, w.URL, w.net)
		if err == nil || !pause(ctx, 50*time.Millisecond) {
			return l, err
		}
	}
}

// leftGoroutines waits until no more goroutines are left than there were, and tells of those that are.
func leftGoroutines(idle int) string {
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > idle; pause(context.Background(), time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<16)
			return string(stacks[:runtime.Stack(stacks, true)])
		}
	}
	return ""
}

// obey does what it is told to.
func (w *worker) obey(in io.Reader, stop func()) {
	for orders := json.NewDecoder(in); ; {
		var o order
		if err := orders.Decode(&o); err != nil {
			os.Exit(1) // nobody is left to tell
		}
		tell := func() { w.say(event{Kind: kindFault, At: w.now(), Text: "link: " + o.Do}) }
		switch o.Do {
		case doAnswer:
			w.mu.Lock()
			answer := w.answers[o.Ask]
			delete(w.answers, o.Ask)
			w.mu.Unlock()
			answer <- o
		case doCalm, doChaos:
			w.net.Heal()
			w.pace(o.Do == doCalm)
		case doStop:
			stop()
		case "cut":
			tell() // before it happens
			w.net.Cut()
		case "hang":
			tell()
			w.net.Hang()
		case "delay":
			tell()
			w.net.Delay(o.Up, o.Down)
		case "reset":
			tell()
			w.net.Reset()
		case "heal":
			w.net.Heal()
			tell()
		}
	}
}

// pace lets holds be long or not. A long hold ends when it becomes calm.
func (w *worker) pace(calm bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case calm == w.calm:
	case calm:
		close(w.calmed)
	default:
		w.calmed = make(chan struct{})
	}
	w.calm = calm
}

func (w *worker) now() time.Duration { return now(w.Epoch) }

// until is a lock's deadline by the shared clock. A process that is stopped between the two clocks finds it nearer.
func (w *worker) until(lock *locker.Lock) time.Duration {
	deadline, now := lock.Deadline(), w.clock.Now()
	return now.Boot - w.Epoch + deadline.Sub(now.Mono)
}

func (w *worker) say(e event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e.Worker, e.Life = w.Worker, w.Life
	if w.out.Encode(e) != nil {
		os.Exit(1) // nobody is left to tell
	}
}

// ask tells something that is answered.
func (w *worker) ask(e event) order {
	answer := make(chan order, 1)
	w.mu.Lock()
	w.asks++
	e.Ask = w.asks
	w.answers[e.Ask] = answer
	w.mu.Unlock()
	w.say(e)
	return <-answer
}

// use acquires a lock, uses it and gives it back, and says what it believes.
func (w *worker) use(ctx context.Context, luck *rand.Rand) {
	think := time.Duration(luck.Int64N(int64(10 * time.Millisecond)))
	wait := w.TTL/4 + time.Duration(luck.Int64N(int64(2*w.TTL)))
	length, much, careless := luck.IntN(10), luck.Float64(), luck.IntN(8) == 0
	e := event{Key: w.Keys[luck.IntN(len(w.Keys))], Lock: int(w.locks.Add(1))}
	if !pause(ctx, think) {
		return
	}
	e.Call = w.now()
	lock, err := w.client.Acquire(ctx, e.Key, locker.WithWait(wait))
	e.At = w.now()
	if err != nil {
		if ctx.Err() == nil {
			e.Kind, e.Text = kindFailed, err.Error()
			w.say(e)
		}
		return
	}
	e.Kind, e.Token, e.Until = kindAcquired, lock.Token(), w.until(lock)
	w.say(e)
	e.Call = 0
	e.Kind, e.At = kindLook, w.now()
	seen := w.ask(e)
	w.hold(ctx, lock, length, much)

	end, lost := w.now(), lock.Err()
	if lost == nil || careless { // careless work writes without asking whether it still may
		e.Kind, e.At, e.Base = kindWrite, end, seen.Base
		w.ask(e)
		if lost == nil {
			end, lost = w.now(), lock.Err()
		}
		e.Sure = lost == nil
	}
	e.Kind, e.Until, e.Base = kindBelieved, w.until(lock), bases{}
	if e.At = min(end, e.Until); lost != nil {
		e.Text = lost.Error()
	}
	w.say(e)
	e.Kind, e.Text = kindReleased, "ok"
	if err := lock.Release(ctx); err != nil {
		e.Text = err.Error()
	}
	e.At = w.now()
	w.say(e)
}

// hold lets the work take its time: mostly little, sometimes longer than a TTL, unless it is calm.
func (w *worker) hold(ctx context.Context, lock *locker.Lock, length int, much float64) {
	most := [10]time.Duration{6: w.TTL / 4, 7: w.TTL / 4, 8: 3 * w.TTL, 9: 3 * w.TTL}[length]
	took := time.NewTimer(time.Duration(much * float64(max(most, 5*time.Millisecond))))
	defer took.Stop()
	w.mu.Lock()
	calmed := w.calmed
	w.mu.Unlock()
	select {
	case <-took.C:
	case <-calmed:
	case <-lock.Done():
	case <-ctx.Done():
	}
}
