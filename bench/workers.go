package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"time"
)

// workerJob makes this program a process of a load: its value is a job.
const workerJob = "LOCKER_BENCH_JOB"

// job is what a worker does: it holds all keys until it is killed, or contends for the first.
type job struct {
	System, Peer, URL string
	TTL, Span         time.Duration
	Keys              []string
	Hold              bool
	Goroutines        int
}

// worker is another process. It says a line when it is ready, contends when it is told to, and answers its shares. It ends
// when its stdin does, and so with this process.
type worker struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func (b *bench) worker(ctx context.Context, p peer, j job) (*worker, error) {
	j.System, j.Peer, j.URL = b.system.name, p.name, b.url
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w := &worker{cmd: exec.CommandContext(ctx, program)}
	w.cmd.Env = append(os.Environ(), workerJob+"="+string(text))
	w.cmd.Stderr = os.Stderr
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	w.out = bufio.NewScanner(out)
	return w, w.cmd.Start()
}

// answer reads a line of the worker.
func (w *worker) answer(to any) error {
	if !w.out.Scan() {
		return errors.Join(errors.New("a worker ended"), w.out.Err())
	}
	return json.Unmarshal(w.out.Bytes(), to)
}

func (w *worker) ready() error {
	var ready bool
	return w.answer(&ready)
}

// stop kills the worker. A second call does nothing.
func (w *worker) stop() {
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait()
}

// work is the life of a worker.
func work(ctx context.Context, text string, in io.Reader, out io.Writer) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	p, err := findPeer(j.System, j.Peer)
	if err != nil {
		return err
	}
	c, err := p.open(ctx, j.URL, j.TTL)
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }()
	if j.Hold {
		for _, key := range j.Keys {
			if _, err := c.lock(ctx, key); err != nil {
				return err
			}
		}
	} else if err := pair(ctx, c, j.Keys[0]+"/warm/"+fmt.Sprint(os.Getpid())); err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(true); err != nil {
		return err
	}
	orders := bufio.NewScanner(in)
	for orders.Scan() { // each line is an order to contend
		shares, err := contend(ctx, c, j.Keys[0], j.Goroutines, j.Span)
		if err == nil {
			err = json.NewEncoder(out).Encode(shares)
		}
		if err != nil {
			return err
		}
	}
	return orders.Err()
}

func findPeer(server, name string) (peer, error) {
	for _, sys := range systems {
		if i := slices.IndexFunc(sys.peers, func(p peer) bool { return p.name == name }); i >= 0 && sys.name == server {
			return sys.peers[i], nil
		}
	}
	return peer{}, fmt.Errorf("no peer %q on %q", name, server)
}

// processes has several processes contend for one key, once to count pairs and once to count commands, because a server
// that is watched is slower.
func processes(ctx context.Context, b *bench, p peer) ([]float64, error) {
	const goroutines = 4
	span := b.short(3 * time.Second)
	workers := make([]*worker, b.small(8, 2))
	key := b.key()
	for i := range workers {
		w, err := b.worker(ctx, p, job{TTL: longTTL, Span: span, Keys: []string{key}, Goroutines: goroutines})
		if err != nil {
			return nil, err
		}
		defer w.stop()
		workers[i] = w
	}
	for _, w := range workers {
		if err := w.ready(); err != nil {
			return nil, err
		}
	}
	shares, err := together(workers)
	if err != nil {
		return nil, err
	}
	pairs, luck := spread(shares)
	type count struct {
		commands int64
		err      error
	}
	counted := make(chan count, 1)
	go func() {
		n, err := b.monitor.commands(ctx, span+500*time.Millisecond)
		counted <- count{n, err}
	}()
	settle(ctx, 100*time.Millisecond) // it watches
	watched, err := together(workers)
	if err != nil {
		return nil, err
	}
	c := <-counted
	if c.err != nil {
		return nil, c.err
	}
	pairsWatched, _ := spread(watched)
	return []float64{pairs / span.Seconds(), luck, float64(c.commands) / max(1, pairsWatched)}, nil
}

// together lets all workers contend at the same time.
func together(workers []*worker) (shares []float64, err error) {
	for _, w := range workers {
		if _, err := fmt.Fprintln(w.in); err != nil {
			return nil, err
		}
	}
	for _, w := range workers {
		var own []float64
		if err := w.answer(&own); err != nil {
			return nil, err
		}
		shares = append(shares, own...)
	}
	return shares, nil
}
