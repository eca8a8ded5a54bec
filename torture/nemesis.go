package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fec20105/locker"
)

// nemesis does harm, and undoes it.
type nemesis struct {
	*run
	harm    []harm         // that is still to be undone
	servers sync.WaitGroup // that are coming back
	begins  []atomic.Bool  // by server, while it does
	failed  chan error     // of those that did not
}

// harm is a fault that goes on.
type harm struct {
	subject string // one thing suffers one harm at a time
	until   time.Duration
	undo    func(ctx context.Context) error
}

func newNemesis(r *run) *nemesis {
	return &nemesis{run: r, begins: make([]atomic.Bool, len(r.target.members)), failed: make(chan error, 100)}
}

// between is a random time.
func (n *nemesis) between(least, most time.Duration) time.Duration {
	return least + time.Duration(n.luck.Int64N(int64(most-least)))
}

func (n *nemesis) suffers(subject string) bool {
	return slices.ContainsFunc(n.harm, func(h harm) bool { return h.subject == subject })
}

// tell notes what is done, before it is done.
func (n *nemesis) tell(worker int, kind, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.note(event{Kind: kind, At: now(n.epoch), Worker: worker, Text: text})
}

// inflict notes a fault and when it is to be undone.
func (n *nemesis) inflict(subject string, d time.Duration, undo func(context.Context) error) {
	n.harm = append(n.harm, harm{subject: subject, until: now(n.epoch) + d, undo: undo})
}

// rage does harm for two to four TTLs.
func (n *nemesis) rage(ctx context.Context) error {
	for _, p := range n.processes[1:] {
		p.order(order{Do: doChaos})
	}
	for end := now(n.epoch) + n.between(2*n.ttl, 4*n.ttl); now(n.epoch) < end; {
		if !pause(ctx, n.between(5*time.Millisecond, 100*time.Millisecond)) {
			return context.Cause(ctx)
		}
		if err := n.undo(ctx, now(n.epoch)); err != nil {
			return err
		}
		if err := n.strike(ctx); err != nil {
			return err
		}
	}
	return nil
}

// heal undoes all harm, and returns when everything works again but for processes that are still beginning.
func (n *nemesis) heal(ctx context.Context) error {
	if err := n.undo(ctx, always); err != nil {
		return err
	}
	n.servers.Wait()
	select {
	case err := <-n.failed:
		return err
	default:
	}
	for _, p := range n.processes[1:] {
		p.order(order{Do: doCalm})
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	at := now(n.epoch)
	n.judge.healed(at)
	n.progress = &progress{since: at, keys: make(map[string]time.Duration), workers: make(map[int]time.Duration)}
	n.heals++
	n.note(event{Kind: kindHeal, At: at})
	return nil
}

// stop waits for what was begun. Servers that are down are stopped next.
func (n *nemesis) stop() { n.servers.Wait() }

// undo undoes the harm that has lasted long enough.
func (n *nemesis) undo(ctx context.Context, at time.Duration) error {
	slices.SortStableFunc(n.harm, func(a, b harm) int { return cmp.Compare(a.until, b.until) })
	for len(n.harm) > 0 && n.harm[0].until <= at {
		h := n.harm[0]
		n.harm = n.harm[1:]
		if err := h.undo(ctx); err != nil {
			return err
		}
	}
	return nil
}

// strike does one kind of harm to somebody who suffers none. Half of the workers are left alone, to take what the others lose.
func (n *nemesis) strike(ctx context.Context) error {
	worker, dice := n.victim(), n.luck.IntN(20)
	suffering := 0
	for i := 1; i <= n.Processes; i++ {
		if n.troubled(i) {
			suffering++
		}
	}
	switch {
	case dice == 0 && len(n.target.members) > 0:
		return n.strikeServers(ctx)
	case worker == 0 || n.troubled(worker) || suffering > n.Processes/2:
		return nil
	case dice < 10:
		return n.strikeProcess(worker)
	default:
		n.strikeLink(worker)
		return nil
	}
}

// troubled tells whether a worker suffers.
func (n *nemesis) troubled(worker int) bool {
	return n.suffers(fmt.Sprint("process ", worker)) || n.suffers(fmt.Sprint("link ", worker))
}

// victim is any worker, or mostly one that holds a lock, if there is one.
func (n *nemesis) victim() int {
	anybody, holder := 1+n.luck.IntN(n.Processes), n.luck.IntN(4) > 0
	n.mu.Lock()
	defer n.mu.Unlock()
	var oldest *belief
	for _, b := range n.judge.open {
		if (oldest == nil || b.from < oldest.from) && !n.troubled(b.worker) {
			oldest = b
		}
	}
	switch {
	case !holder:
		return anybody
	case oldest == nil:
		return 0
	}
	return oldest.worker
}

func (n *nemesis) strikeProcess(worker int) error {
	subject, kill := fmt.Sprint("process ", worker), n.luck.IntN(5) < 2
	d := n.span()
	p := n.processes[worker]
	if kill {
		n.tell(worker, kindFault, "kill")
		n.faults["kills"]++
		n.kill(p)
		n.inflict(subject, d/2, func(context.Context) error {
			n.tell(worker, kindFault, "start")
			if err := n.start(worker, p.life+1); err != nil {
				return err
			}
			n.processes[worker].order(order{Do: doChaos})
			return nil
		})
		return nil
	}
	n.tell(worker, kindFault, "stop")
	n.faults["stops"]++
	p.signal(syscall.SIGSTOP)
	n.inflict(subject, d, func(context.Context) error {
		n.tell(worker, kindFault, "continue")
		p.signal(syscall.SIGCONT)
		return nil
	})
	return nil
}

// strikeLink harms the link of a worker, which tells of it itself.
func (n *nemesis) strikeLink(worker int) {
	subject := fmt.Sprint("link ", worker)
	o := order{Do: []string{"cut", "hang", "delay", "reset"}[n.luck.IntN(4)]}
	o.Up, o.Down = n.between(0, n.ttl/4), n.between(0, n.ttl/4)
	d := n.span()
	n.faults[map[string]string{"cut": "cuts", "hang": "hangs", "delay": "delays", "reset": "resets"}[o.Do]]++
	n.processes[worker].order(o)
	if o.Do == "reset" {
		return
	}
	n.inflict(subject, d, func(context.Context) error {
		n.processes[worker].order(order{Do: "heal"})
		return nil
	})
}

// strikeServers harms one server, or several at the same time.
func (n *nemesis) strikeServers(ctx context.Context) error {
	members := len(n.target.members)
	count := []int{1, 1, 1, max(1, members/2), members}[n.luck.IntN(5)]
	what := []string{"pause", "pause", "crash", "restart"}[n.luck.IntN(4)]
	d := n.span()
	if what == "restart" { // a clean stop takes its time where others are down
		if count = 1; n.serversSuffer() {
			what = "crash"
		}
	}
	for _, i := range n.luck.Perm(members)[:count] {
		subject := fmt.Sprint("server ", i+1)
		if n.suffers(subject) || n.begins[i].Load() {
			continue
		}
		n.evicts(what)
		if what != "restart" {
			n.tell(0, kindFault, what+" "+subject)
		}
		n.faults[map[string]string{"pause": "server pauses", "crash": "server crashes", "restart": "server restarts"}[what]]++
		if err := n.hurt(ctx, i, subject, what, d); err != nil {
			return err
		}
	}
	return nil
}

// serversSuffer tells whether a server is down, or comes back.
func (n *nemesis) serversSuffer() bool {
	for i := range n.begins {
		if n.suffers(fmt.Sprint("server ", i+1)) || n.begins[i].Load() {
			return true
		}
	}
	return false
}

// evicts notes that locks may be freed early until everything is healed, where EarlyFree says so.
func (n *nemesis) evicts(what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	early := n.judge.caps.EarlyFree
	if what != "pause" && early&locker.EarlyFreeRestart != 0 || len(n.target.members) > 1 && early&locker.EarlyFreeFailover != 0 {
		n.judge.evicts(0, now(n.epoch), always)
	}
}

func (n *nemesis) hurt(ctx context.Context, i int, subject, what string, d time.Duration) error {
	s := n.target.members[i]
	// Members of a cluster come back together: each waits for most of the others.
	back := func(how string, f func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			n.tell(0, kindFault, how+" "+subject)
			n.begins[i].Store(true)
			n.servers.Go(func() {
				defer n.begins[i].Store(false)
				if err := f(ctx); err != nil && ctx.Err() == nil {
					n.failed <- err
				}
			})
			return nil
		}
	}
	switch what {
	case "pause":
		n.inflict(subject, d, back("resume", s.Resume))
		return s.Pause(ctx)
	case "crash":
		n.inflict(subject, d/2, back("start", s.Start))
		return s.Kill(ctx)
	default:
		n.inflict(subject, d, func(context.Context) error { return nil })
		return back("restart", s.Restart)(ctx)
	}
}

// span is how long harm lasts: in half of the cases longer than a lock that is not renewed.
func (n *nemesis) span() time.Duration {
	if n.luck.IntN(2) == 0 {
		return n.between(n.ttl/8, n.ttl)
	}
	return n.between(n.ttl, 2*n.ttl)
}
