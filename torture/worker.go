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

// order is a line that a worker gets: a fault of its link by its name, a change of pace, or the answer to a look or a write.
type order struct {
	Do       string
	Up, Down time.Duration `json:",omitempty"` // of a delay
	Ask      int           `json:",omitempty"`
	Seen     versions      `json:",omitzero"`
	Refused  bool          `json:",omitempty"`
}

// The orders that are no faults.
const (
	doAnswer = "answer"
	doHeal   = "heal" // the link
	doCalm   = "calm" // and no long holds
	doChaos  = "chaos"
	doStop   = "stop"
)

// hands is how many locks a worker uses at the same time.
const hands = 2

// worker is a process that uses locks.
type worker struct {
	job
	net    *conformance.Network
	faults []string // of the link
	client *locker.Client
	locks  atomic.Int64

	mu      sync.Mutex
	out     *json.Encoder
	asks    int
	answers map[int]chan order
	calm    context.Context // ends when it becomes calm
	calmed  context.CancelFunc
}

// work is the life of a worker. It ends when it is told to, and at once when who started it is gone.
func work(text string, in io.Reader, out io.Writer) error {
	w := &worker{net: conformance.NewNetwork(), out: json.NewEncoder(out), answers: make(map[int]chan order)}
	w.calm, w.calmed = context.WithCancel(context.Background())
	if err := json.Unmarshal([]byte(text), &w.job); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go w.obey(in, stop)
	idle := runtime.NumGoroutine()
	l, err := open(ctx, w.URL, w.net)
	for err != nil && pause(ctx, 50*time.Millisecond) { // the server may be down
		l, err = open(ctx, w.URL, w.net)
	}
	if err != nil {
		return err
	}
	w.client, err = locker.New(breakIt(w.Broken, l), locker.WithTTL(w.TTL), locker.WithReleaseTimeout(w.TTL),
		locker.WithHolder(fmt.Sprintf("torture worker %d.%d", w.Worker, w.Life)))
	if err != nil {
		return err
	}
	w.say(kindReady, event{})
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
	bye := event{Left: w.net.Stats().Open}
	if err := w.net.Close(); err != nil {
		return err
	}
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > idle && bye.Text == ""; pause(context.Background(), time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<16)
			bye.Text = string(stacks[:runtime.Stack(stacks, true)])
		}
	}
	w.say(kindBye, bye)
	return nil
}

// obey does what it is told to.
func (w *worker) obey(in io.Reader, stop func()) {
	for orders := json.NewDecoder(in); ; {
		var o order
		if err := orders.Decode(&o); err != nil {
			os.Exit(1) // nobody is left to tell
		}
		switch o.Do {
		case doAnswer:
			w.mu.Lock()
			answer := w.answers[o.Ask]
			delete(w.answers, o.Ask)
			w.mu.Unlock()
			answer <- o
		case doStop:
			stop()
		case doHeal, doCalm, doChaos:
			w.net.Heal()
			for _, fault := range w.faults {
				w.say(kindFault, event{Text: endOf + fault})
			}
			w.faults = nil
			w.pace(o.Do)
		default:
			w.faults = append(w.faults, o.Do)
			w.say(kindFault, event{Text: o.Do}) // before it happens
			map[string]func(){
				"cut": func() { w.net.Cut() }, "hang": w.net.Hang, "delay": func() { w.net.Delay(o.Up, o.Down) }, "reset": w.net.Reset,
			}[o.Do]()
		}
	}
}

// pace lets holds be long or not. A long one ends when it becomes calm.
func (w *worker) pace(do string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if do == doCalm {
		w.calmed()
	} else if do == doChaos && w.calm.Err() != nil {
		w.calm, w.calmed = context.WithCancel(context.Background())
	}
}

// until is a lock's deadline by the shared clock. A process that is stopped between the two clocks finds it nearer.
func (w *worker) until(lock *locker.Lock) time.Duration {
	deadline, now := lock.Deadline(), clock.System().Now()
	return now.Boot - w.Epoch + deadline.Sub(now.Mono)
}

// say tells an event, which happens now if it has no time of its own.
func (w *worker) say(kind string, e event) {
	if e.Kind, e.Worker, e.Life = kind, w.Worker, w.Life; e.At == 0 {
		e.At = now(w.Epoch)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out.Encode(e) != nil {
		os.Exit(1) // nobody is left to tell
	}
}

// ask tells something that is answered.
func (w *worker) ask(kind string, e event) order {
	answer := make(chan order, 1)
	w.mu.Lock()
	w.asks++
	e.Ask = w.asks
	w.answers[e.Ask] = answer
	w.mu.Unlock()
	w.say(kind, e)
	return <-answer
}

// use acquires a lock, uses it and gives it back, and says what it believes.
func (w *worker) use(ctx context.Context, luck *rand.Rand) {
	random := func(d time.Duration) time.Duration { return time.Duration(luck.Int64N(int64(d))) }
	think, wait, length := random(10*time.Millisecond), w.TTL/4+random(2*w.TTL), w.TTL+random(2*w.TTL)
	if luck.IntN(5) > 0 {
		length = random(5 * time.Millisecond)
	}
	careless := luck.IntN(8) == 0 // writes without asking whether it still may
	e := event{Key: w.Keys[luck.IntN(len(w.Keys))], Lock: int(w.locks.Add(1))}
	if !pause(ctx, think) {
		return
	}
	asked := now(w.Epoch)
	lock, err := w.client.Acquire(ctx, e.Key, locker.WithWait(wait))
	granted := now(w.Epoch)
	if err != nil {
		if e.Text = err.Error(); ctx.Err() == nil {
			w.say(kindFailed, e)
		}
		return
	}
	e.Token = lock.Token()
	begin := e
	begin.At, begin.Call, begin.Until = granted, asked, w.until(lock)
	w.say(kindAcquired, begin)
	write := e
	write.Seen = w.ask(kindLook, e).Seen
	w.hold(ctx, lock, length)

	end := e
	end.At = now(w.Epoch)
	lost := lock.Err()
	if lost == nil || careless {
		w.ask(kindWrite, write)
		if lost == nil {
			end.At, lost = now(w.Epoch), lock.Err()
			end.Sure = lost == nil
		}
	}
	end.Until = w.until(lock)
	end.At = min(end.At, end.Until)
	if lost != nil {
		end.Text = lost.Error()
	}
	w.say(kindBelieved, end)
	e.Text = "ok"
	if err := lock.Release(ctx); err != nil {
		e.Text = err.Error()
	}
	w.say(kindReleased, e)
}

// hold lets the work take its time, or less if it is calm.
func (w *worker) hold(ctx context.Context, lock *locker.Lock, length time.Duration) {
	w.mu.Lock()
	calm := w.calm
	w.mu.Unlock()
	took := time.NewTimer(length)
	defer took.Stop()
	select {
	case <-took.C:
	case <-calm.Done():
	case <-lock.Done():
	case <-ctx.Done():
	}
}
