package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
)

// settings are what the flags say.
type settings struct {
	Time, TTL       time.Duration
	Seed            uint64
	Processes, Keys int
	Broken          string
	Out             string // the folder of histories
}

// run tortures one target.
type run struct {
	settings
	target *target
	keys   []string
	epoch  time.Duration
	ttl    time.Duration // as granted
	bound  time.Duration // within which everybody has had a lock after a heal
	luck   *rand.Rand
	stderr *os.File // of the workers
	faults map[string]int
	heals  int
	worst  time.Duration // progress after a heal

	mu        sync.Mutex
	end       context.CancelCauseFunc
	history   *history
	judge     *judge
	processes []*process // by worker; there is none of number 0
	progress  *progress  // nil unless it is waited for
}

// progress is what has happened since everything works again: the first lock of each key and worker.
type progress struct {
	since   time.Duration
	keys    map[string]time.Duration
	workers map[int]time.Duration
}

// slack is how late the scheduler of this machine may be, as in the conformance suite.
func slack() time.Duration {
	if os.Getenv("CI") == "true" {
		return 500 * time.Millisecond
	}
	return 100 * time.Millisecond
}

// torture runs the processes and the nemesis against a target for the time that is given. The error is a *violation, or
// why it could not go on.
func torture(ctx context.Context, s settings, t *target) (*run, error) {
	r := &run{settings: s, target: t, faults: make(map[string]int), luck: rand.New(rand.NewPCG(s.Seed, 0)), processes: make([]*process, s.Processes+1)}
	r.epoch = now(0)
	for i := range s.Keys {
		r.keys = append(r.keys, fmt.Sprintf("torture/%x/%d", uint64(r.epoch), i+1))
	}
	caps, err := t.wait(ctx, r.keys[0])
	if err != nil {
		return nil, err
	}
	r.ttl = max(s.TTL, caps.MinTTL)
	if g := caps.Granularity; g > 0 {
		r.ttl = (r.ttl + g - 1) / g * g
	}
	r.bound = r.ttl + caps.Expiry + max(2*time.Second, caps.Fallback) + slack()
	r.judge = newJudge(caps, r.ttl)
	if r.history, err = newHistory(filepath.Join(s.Out, t.name+".jsonl")); err != nil {
		return nil, err
	}
	if r.stderr, err = os.Create(filepath.Join(s.Out, t.name+".stderr")); err != nil {
		return nil, err
	}
	defer r.stderr.Close()
	working, end := context.WithCancelCause(ctx)
	defer end(nil)
	r.end = end
	err = r.live(working)
	if err == nil {
		err = r.leftovers(working)
	}
	r.killAll()
	if v, ok := errors.AsType[*violation](context.Cause(working)); ok {
		err = v
	} else if ctx.Err() != nil {
		err = ctx.Err()
	}
	last := event{Kind: kindVerdict, At: now(r.epoch), Text: "ok"}
	if err != nil {
		last.Text = err.Error()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note(last)
	return r, errors.Join(err, r.history.close())
}

// live lets the workers live through good times and bad ones, and end.
func (r *run) live(ctx context.Context) error {
	for worker := 1; worker <= r.Processes; worker++ {
		if err := r.start(worker, 1); err != nil {
			return err
		}
	}
	n := newNemesis(r)
	defer n.stop()
	// In the last good time what the killed have left runs out.
	chaos := r.Time - r.bound
	for {
		if err := n.heal(ctx); err != nil {
			return err
		}
		if err := r.awaitProgress(ctx); err != nil {
			return err
		}
		if now(r.epoch) >= chaos {
			break
		}
		if err := n.rage(ctx); err != nil {
			return err
		}
	}
	if rest := r.Time - now(r.epoch); !pause(ctx, rest) {
		return context.Cause(ctx)
	}
	return r.sayGoodbye(ctx)
}

// awaitProgress waits until each key was locked and each worker had a lock since everything works again.
func (r *run) awaitProgress(ctx context.Context) error {
	for {
		r.mu.Lock()
		waits, late := r.waiting(now(r.epoch))
		if late {
			r.violated(&violation{
				Kind: "progress", Key: waits, From: r.progress.since - r.ttl, To: now(r.epoch),
				Text: fmt.Sprintf("everything works again since %v, and within %v nobody has had a lock: %s", seconds(r.progress.since), r.bound, waits),
			})
		}
		if waits == "" {
			r.note(event{Kind: kindProgress, At: now(r.epoch)})
			r.progress = nil
		}
		r.mu.Unlock()
		if waits == "" {
			return nil
		}
		if !pause(ctx, 10*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// waiting names a key and a worker that have had no lock since everything works again, and tells whether one had none in time.
func (r *run) waiting(at time.Duration) (who string, late bool) {
	const news = time.Second // on its way
	look := func(name string, since, first time.Duration) {
		switch {
		case first == 0:
			who = name
			late = late || at > since+r.bound+news
		default:
			late = late || first > since+r.bound
			r.worst = max(r.worst, first-since)
		}
	}
	soonest := always
	for _, p := range r.processes[1:] {
		since := max(r.progress.since, p.ready)
		if p.ready == 0 {
			since = r.progress.since + startTimeout
		}
		soonest = min(soonest, since)
		look(fmt.Sprintf("worker %d", p.worker), since, r.progress.workers[p.worker])
	}
	for _, key := range r.keys {
		look(key, soonest, r.progress.keys[key])
	}
	return who, late
}

// startTimeout is how long a process may take to begin.
const startTimeout = 20 * time.Second

// sayGoodbye ends all workers in good order.
func (r *run) sayGoodbye(ctx context.Context) error {
	for _, p := range r.processes[1:] {
		p.order(order{Do: doStop})
	}
	deadline, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, p := range r.processes[1:] {
		select {
		case <-p.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline.Done():
			p.signal(syscall.SIGQUIT) // it tells what it does
			<-p.gone
			return fmt.Errorf("worker %d had to be killed", p.worker)
		}
		if bye := p.bye; bye != nil && (bye.Leaked != 0 || bye.Text != "") {
			return &violation{
				Kind: "leak", From: bye.At - time.Second, To: bye.At, Holds: []hold{{worker: p.worker, life: p.life}},
				Text: fmt.Sprintf("worker %d has closed everything, and %d connections are left, and goroutines: %s", p.worker, bye.Leaked, bye.Text),
			}
		}
	}
	return nil
}

// leftovers looks for what the workers have left at the servers: all of them have given back everything, and what those
// that were killed had left has run out.
func (r *run) leftovers(ctx context.Context) (err error) {
	net := conformance.NewNetwork()
	observer, err := open(ctx, r.target.url, net)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, observer.Close(), net.Close()) }()
	for _, key := range r.keys {
		if err := tryLock(ctx, observer, key); err != nil {
			return r.leak("%s cannot be locked: %v", key, err)
		}
	}
	lister, ok := locker.As[locker.Lister](observer)
	if !ok {
		return nil
	}
	for held, err := range lister.List(ctx) {
		if err != nil {
			return err
		}
		if slices.Contains(r.keys, held.Key) {
			return r.leak("%s is held by %q with token %d", held.Key, held.Holder, held.Token)
		}
	}
	return nil
}

func (r *run) leak(format string, args ...any) error {
	at := now(r.epoch)
	return &violation{Kind: "leak", From: at - 2*r.ttl, To: at, Text: "all workers have ended, and " + fmt.Sprintf(format, args...)}
}

// killAll ends what still runs.
func (r *run) killAll() {
	for _, p := range r.processes[1:] {
		if p != nil {
			r.kill(p)
		}
	}
}

// hear takes an event of a process.
func (r *run) hear(p *process, e event) order {
	r.mu.Lock()
	defer r.mu.Unlock()
	p.heard = e.At
	switch e.Kind {
	case kindReady:
		p.ready = e.At
	case kindBye:
		p.bye = &e
	case kindAcquired:
		if r.progress != nil && e.At >= r.progress.since {
			if _, again := r.progress.keys[e.Key]; !again {
				r.progress.keys[e.Key] = e.At
			}
			if _, again := r.progress.workers[e.Worker]; !again && p == r.processes[e.Worker] {
				r.progress.workers[e.Worker] = e.At
			}
		}
	}
	answer, v := r.judge.hear(e)
	e.Refused = answer.Refused
	r.note(e)
	if v != nil {
		r.violated(v)
	}
	return answer
}

// note writes to the history.
func (r *run) note(e event) { _ = r.history.enc.Encode(e) } // its close tells what went wrong

// violated ends the run. The first violation counts.
func (r *run) violated(v *violation) { r.end(v) }
