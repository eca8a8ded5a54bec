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
	target  *target
	keys    []string
	epoch   time.Duration // when it began
	ttl     time.Duration // as granted
	bound   time.Duration // within which everybody has a lock once everything works again
	slowest time.Duration // that was seen of that
	luck    *rand.Rand
	stderr  *os.File // of the workers
	faults  map[string]int
	heals   int
	end     context.CancelCauseFunc // with a violation; the first counts

	mu        sync.Mutex
	history   *history
	judge     *judge
	processes []*process // by worker; there is none of number 0
}

// slack is how late the scheduler of this machine may be, as in the conformance suite.
func slack() time.Duration {
	if os.Getenv("CI") == "true" {
		return 500 * time.Millisecond
	}
	return 100 * time.Millisecond
}

// torture runs the workers and the nemesis against a target for the time that is given. The error is a *violation, or why it
// could not go on.
func torture(ctx context.Context, s settings, t *target) (*run, error) {
	r := &run{settings: s, target: t, epoch: now(0), faults: make(map[string]int), luck: rand.New(rand.NewPCG(s.Seed, 0)), processes: make([]*process, s.Processes+1)}
	for i := range s.Keys {
		r.keys = append(r.keys, fmt.Sprintf("torture/%x/%d", uint64(r.epoch), i+1))
	}
	caps, err := t.wait(ctx, r.keys[0])
	if err != nil {
		return nil, err
	}
	r.ttl = max(s.TTL, caps.MinTTL)
	if g := caps.Granularity; g > 0 && r.ttl%g > 0 {
		r.ttl += g - r.ttl%g
	}
	r.bound = r.ttl + caps.Expiry + max(2*time.Second, caps.Fallback) + slack()
	if least := r.bound + 2*r.ttl; r.Time < least {
		return nil, fmt.Errorf("a -time of %v leaves none for faults at a TTL of %v: give %v at least", r.Time, r.ttl, least)
	}
	r.judge = newJudge(caps, r.ttl, len(t.members) > 1)
	if r.history, err = newHistory(filepath.Join(s.Out, t.name+".jsonl")); err != nil {
		return nil, err
	}
	if r.stderr, err = os.Create(filepath.Join(s.Out, t.name+".stderr")); err != nil {
		return nil, errors.Join(err, r.history.close())
	}
	defer r.stderr.Close()
	working, end := context.WithCancelCause(ctx)
	defer end(nil)
	r.end = end
	err = r.live(working)
	for _, p := range r.processes[1:] {
		if p != nil {
			r.kill(p)
		}
	}
	if v, ok := errors.AsType[*violation](context.Cause(working)); ok {
		err = v // what came of it does not matter
	}
	last := event{Kind: kindVerdict, Text: "ok"}
	if err != nil {
		last.Text = err.Error()
	}
	r.tell(last)
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
	defer n.starting.Wait()
	for last := r.Time - r.bound; ; {
		if err := n.heal(); err != nil {
			return err
		}
		healed := now(r.epoch)
		if err := r.awaitProgress(ctx); err != nil {
			return err
		}
		if now(r.epoch) < last {
			if err := n.rage(ctx, last); err != nil {
				return err
			}
			continue
		}
		// By then everything has run out that was left by those who were killed.
		if !pause(ctx, max(r.Time, healed+r.bound)-now(r.epoch)) {
			return context.Cause(ctx)
		}
		break
	}
	if err := r.sayGoodbye(ctx); err != nil {
		return err
	}
	return r.leftovers(ctx)
}

// awaitProgress waits until each key was locked and each worker had a lock since everything works again.
func (r *run) awaitProgress(ctx context.Context) error {
	for {
		r.mu.Lock()
		since := r.judge.healed
		who, late, slowest := r.judge.waiting(r.keys, r.Processes, r.bound, now(r.epoch))
		r.mu.Unlock()
		switch {
		case late:
			return &violation{
				Kind: "progress", Key: who, From: since - r.ttl, To: now(r.epoch),
				Text: fmt.Sprintf("everything works again since %s, and within %v there was no lock of %s", seconds(since), r.bound, who),
			}
		case who == "":
			r.slowest = max(r.slowest, slowest)
			r.tell(event{Kind: kindProgress})
			return nil
		}
		if !pause(ctx, 10*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// sayGoodbye ends all workers in good order.
func (r *run) sayGoodbye(ctx context.Context) error {
	for _, p := range r.processes[1:] {
		p.order(order{Do: doStop})
	}
	timeout := time.NewTimer(10*time.Second + 10*slack())
	defer timeout.Stop()
	for _, p := range r.processes[1:] {
		select {
		case <-p.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timeout.C:
			_ = p.signal(syscall.SIGQUIT) // it tells what it is doing; that is a crash
			<-p.gone
			return context.Cause(ctx)
		}
		if bye := p.bye; bye != nil && (bye.Left != 0 || bye.Text != "") {
			return r.leak("worker %d has closed everything, and %d connections are left, and goroutines: %s", p.worker, bye.Left, bye.Text)
		}
	}
	return nil
}

// leftovers looks for what is left at the servers: all workers have given back everything, and what those that were killed had
// left has run out.
func (r *run) leftovers(ctx context.Context) (err error) {
	net := conformance.NewNetwork()
	observer, err := open(ctx, r.target.url, net)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, observer.Close(), net.Close()) }()
	for _, key := range r.keys {
		if err := tryLock(ctx, observer, key); err != nil {
			return r.leak("all workers have ended, and %s cannot be locked: %v", key, err)
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
			return r.leak("all workers have ended, and %s is held by %q with token %d", held.Key, held.Holder, held.Token)
		}
	}
	return nil
}

func (r *run) leak(format string, args ...any) error {
	at := now(r.epoch)
	return &violation{Kind: "leak", From: at - 2*r.ttl, To: at, Text: fmt.Sprintf(format, args...)}
}

// tell notes an event that happens now.
func (r *run) tell(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.At = now(r.epoch)
	r.hear(e)
}

// hear judges an event and notes it; r.mu is held.
func (r *run) hear(e event) order {
	answer, v := r.judge.hear(e)
	e.Refused = answer.Refused
	r.history.note(e)
	if v != nil {
		r.end(v)
	}
	return answer
}
