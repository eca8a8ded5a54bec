package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// process is one life of a worker, as the process that started it sees it.
type process struct {
	worker, life int
	cmd          *exec.Cmd
	gone         chan struct{} // closed when it has ended and all that it has said is heard

	writing sync.Mutex
	orders  *json.Encoder

	// Everything below belongs to run.mu.
	heard  time.Duration // when it said something last
	killed time.Duration // just before it was killed; 0: it was not
	bye    *event
}

// start gives a worker a life.
func (r *run) start(worker, life int) error {
	text, err := json.Marshal(job{
		URL: r.target.url, Worker: worker, Life: life, Seed: r.Seed, Epoch: r.epoch, Keys: r.keys, TTL: r.TTL, Broken: r.Broken,
	})
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	p := &process{worker: worker, life: life, gone: make(chan struct{}), cmd: exec.CommandContext(context.Background(), program)}
	p.cmd.Env = append(os.Environ(), workerJob+"="+string(text))
	p.cmd.Stderr = r.stderr
	// In a group of its own it misses the Ctrl-C that ends this program; and when this program is killed, the kernel ends those
	// that are stopped. The others see the end of their orders.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p.orders = json.NewEncoder(in)
	if err := p.cmd.Start(); err != nil {
		return err
	}
	r.mu.Lock()
	r.processes[worker] = p
	r.mu.Unlock()
	go r.listen(p, out)
	return nil
}

// listen hears what a process says until it is gone.
func (r *run) listen(p *process, out io.Reader) {
	defer close(p.gone)
	for lines := json.NewDecoder(out); ; {
		var e event
		if lines.Decode(&e) != nil {
			break
		}
		r.mu.Lock()
		p.heard = e.At
		if e.Kind == kindBye {
			p.bye = &e
		}
		answer := r.hear(e)
		r.mu.Unlock()
		if answer.Do != "" {
			p.order(answer)
		}
	}
	err := p.cmd.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	end := event{Kind: kindEnded, At: now(r.epoch), Worker: p.worker, Life: p.life, Text: "killed"}
	lived := p.killed
	if p.killed == 0 {
		end.Text, lived = "by itself", p.heard
		if err != nil || p.bye == nil {
			r.end(&violation{
				Kind: "crash", From: p.heard, To: end.At, Holds: []hold{{worker: p.worker, life: p.life}},
				Text: fmt.Sprintf("worker %d has ended without being told to (%v): see %s", p.worker, p.cmd.ProcessState, r.stderr.Name()),
			})
		}
	}
	r.hear(end)
	if v := r.judge.gone(p.worker, p.life, lived); v != nil {
		r.end(v)
	}
}

// order tells a process something. One that is gone does not hear it.
func (p *process) order(o order) {
	p.writing.Lock()
	defer p.writing.Unlock()
	_ = p.orders.Encode(o)
}

func (p *process) signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// kill ends a process at once. What it believed ends no later than now.
func (r *run) kill(p *process) {
	r.mu.Lock()
	if p.killed == 0 {
		p.killed = now(r.epoch)
	}
	r.mu.Unlock()
	_ = p.signal(syscall.SIGKILL) // it may be gone
	<-p.gone
}
