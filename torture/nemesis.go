package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// nemesis does harm, and undoes it.
type nemesis struct {
	*run
	harm     []harm // that is still to be undone
	starting sync.WaitGroup
	starts   []atomic.Bool // by server, while it does
	failed   chan error    // of those that could not
}

// harm is a fault that goes on: of a worker, of its link, or of a server.
type harm struct {
	subject string // "process 1", "link 1", "server 1"
	until   time.Duration
	undo    func() error
}

func newNemesis(r *run) *nemesis {
	return &nemesis{run: r, starts: make([]atomic.Bool, len(r.target.members)), failed: make(chan error, 100)}
}

// between is a random time.
func (n *nemesis) between(least, most time.Duration) time.Duration {
	return least + time.Duration(n.luck.Int64N(int64(most-least)))
}

// span is how long harm lasts: in half of the cases longer than a lock that is not renewed.
func (n *nemesis) span() time.Duration {
	if n.luck.IntN(2) == 0 {
		return n.between(n.ttl/8, n.ttl)
	}
	return n.between(n.ttl, 2*n.ttl)
}

func (n *nemesis) suffers(kind string, i int) bool {
	subject := fmt.Sprint(kind, " ", i)
	return slices.ContainsFunc(n.harm, func(h harm) bool { return h.subject == subject })
}

func (n *nemesis) down(server int) bool {
	return n.suffers("server", server+1) || n.starts[server].Load()
}

// inflict notes harm to a worker, to a link, which tells of it itself, or to a server, just before it is done.
func (n *nemesis) inflict(fault, kind string, i int, d time.Duration, undo func() error) {
	n.faults[fault]++
	switch kind {
	case "process":
		n.tell(event{Kind: kindFault, Worker: i, Text: fault})
	case "server":
		n.tell(event{Kind: kindFault, Text: fmt.Sprint(fault, " server ", i)})
	}
	n.harm = append(n.harm, harm{subject: fmt.Sprint(kind, " ", i), until: now(n.epoch) + d, undo: undo})
}

// undo undoes the harm that has lasted long enough.
func (n *nemesis) undo(at time.Duration) error {
	for {
		i := slices.IndexFunc(n.harm, func(h harm) bool { return h.until <= at })
		if i < 0 {
			return nil
		}
		h := n.harm[i]
		n.harm = slices.Delete(n.harm, i, i+1)
		if err := h.undo(); err != nil {
			return err
		}
	}
}

// rage does harm for two to four TTLs, but not beyond last.
func (n *nemesis) rage(ctx context.Context, last time.Duration) error {
	for _, p := range n.processes[1:] {
		p.order(order{Do: doChaos})
	}
	for end := min(last, now(n.epoch)+n.between(2*n.ttl, 4*n.ttl)); now(n.epoch) < end; {
		if !pause(ctx, n.between(5*time.Millisecond, 100*time.Millisecond)) {
			return context.Cause(ctx)
		}
		if err := n.undo(now(n.epoch)); err != nil {
			return err
		}
		if err := n.strike(ctx); err != nil {
			return err
		}
	}
	return nil
}

// heal undoes all harm, and returns when everything works again but for processes that are still beginning.
func (n *nemesis) heal() error {
	if err := n.undo(always); err != nil {
		return err
	}
	n.starting.Wait()
	select {
	case err := <-n.failed:
		return err
	default:
	}
	for _, p := range n.processes[1:] {
		p.order(order{Do: doCalm})
	}
	n.heals++
	n.tell(event{Kind: kindHeal})
	return nil
}

// strike does one kind of harm to somebody. Half of the workers are left alone, to take what the others lose; a link may suffer
// more than one fault.
func (n *nemesis) strike(ctx context.Context) error {
	worker, dice, d := n.victim(), n.luck.IntN(20), n.span()
	well := n.Processes
	for i := range n.processes {
		if n.suffers("process", i) || n.suffers("link", i) {
			well--
		}
	}
	switch {
	case dice == 0 && len(n.target.members) > 0:
		return n.strikeServers(ctx, d)
	case worker == 0 || n.suffers("process", worker) || !n.suffers("link", worker) && well <= n.Processes/2:
	case dice < 4:
		n.killFor(worker, d/4)
	case dice < 10:
		p := n.processes[worker]
		n.inflict("stop", "process", worker, d, func() error {
			n.tell(event{Kind: kindFault, Worker: worker, Text: endOf + "stop"})
			return p.signal(syscall.SIGCONT)
		})
		return p.signal(syscall.SIGSTOP)
	default:
		n.strikeLink(worker, []string{"cut", "hang", "delay", "reset"}[n.luck.IntN(4)], d)
	}
	return nil
}

// strikeLink harms the link of a worker.
func (n *nemesis) strikeLink(worker int, fault string, d time.Duration) {
	o := order{Do: fault, Up: n.between(0, n.ttl/4), Down: n.between(0, n.ttl/4)}
	thenCut := fault == "delay" && n.luck.IntN(2) == 0 // a late answer is the last one
	n.inflict(fault, "link", worker, d, func() error {
		if thenCut {
			n.strikeLink(worker, "cut", n.between(n.ttl/2, 2*n.ttl))
			return nil
		}
		n.processes[worker].order(order{Do: doHeal})
		return nil
	})
	n.processes[worker].order(o)
}

// victim is any worker, or mostly one that holds a lock, if there is one.
func (n *nemesis) victim() int {
	anybody, holder := 1+n.luck.IntN(n.Processes), n.luck.IntN(4) > 0
	if !holder {
		return anybody
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	oldest := &belief{from: always}
	for _, b := range n.judge.open {
		if b.from < oldest.from && !n.suffers("process", b.worker) {
			oldest = b
		}
	}
	return oldest.worker
}

// killFor kills a worker, and gives it another life later.
func (n *nemesis) killFor(worker int, d time.Duration) {
	p := n.processes[worker]
	n.inflict("kill", "process", worker, d, func() error {
		n.tell(event{Kind: kindFault, Worker: worker, Text: endOf + "kill"})
		return n.start(worker, p.life+1)
	})
	n.kill(p)
}

// strikeServers harms one server, or several at the same time.
func (n *nemesis) strikeServers(ctx context.Context, d time.Duration) error {
	members := len(n.target.members)
	count := []int{1, 1, 1, max(1, members/2), members}[n.luck.IntN(5)]
	fault := []string{"pause", "pause", "crash", "restart"}[n.luck.IntN(4)]
	chosen := n.luck.Perm(members)
	if fault == "restart" { // a clean stop takes its time where others are down
		if count = 1; slices.ContainsFunc(chosen, n.down) {
			fault = "crash"
		}
	}
	for _, i := range chosen[:count] {
		if n.down(i) {
			continue
		}
		if err := n.strikeServer(ctx, i, fault, d); err != nil {
			return err
		}
	}
	return nil
}

func (n *nemesis) strikeServer(ctx context.Context, i int, fault string, d time.Duration) error {
	s := n.target.members[i]
	// Members of a cluster come back together: each waits for most of the others.
	back := func(f func(context.Context) error) func() error {
		return func() error {
			n.starts[i].Store(true)
			n.starting.Go(func() {
				defer n.starts[i].Store(false)
				if err := f(ctx); err != nil {
					n.failed <- err
				}
				n.tell(event{Kind: kindFault, Text: fmt.Sprint(endOf, fault, " server ", i+1)})
			})
			return nil
		}
	}
	switch fault {
	case "pause":
		n.inflict(fault, "server", i+1, d, back(s.Resume))
		return s.Pause(ctx)
	case "crash":
		n.inflict(fault, "server", i+1, d/2, back(s.Start))
		return s.Kill(ctx)
	default:
		n.inflict(fault, "server", i+1, d, func() error { return nil }) // it comes back by itself
		return back(s.Restart)()
	}
}
