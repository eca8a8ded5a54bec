package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

// A batch may take as long as the most patient of its callers, within these bounds. A caller that gives up sooner
// leaves, and does not end the connection on which the others are served.
const (
	minPatience     = time.Second
	maxPatience     = 30 * time.Second
	defaultPatience = 5 * time.Second // for callers without a deadline
)

const (
	maxBatch   = 500                   // calls in one batch, so that the server gets to serve others in between
	maxBatches = 16                    // batches under way, if the client's pool is not smaller
	maxIdle    = 2                     // goroutines kept for the next calls
	offerTime  = 20 * time.Microsecond // that a call waits for another to go out with; much less than a round trip
	firstDelay = 4 * time.Millisecond  // until a third batch is sent beside two slow ones; doubles with each further one, half for a second
)

// hungAfter is how long a server may answer nothing until it counts as hung.
const hungAfter = minPatience

// directPatience is how long a call may take that is made by its caller's own goroutine, which does not notice there
// that its ctx is cancelled.
const directPatience = 40 * time.Millisecond

// replicaTimeout is how long the server waits for the replicas to confirm.
const replicaTimeout = time.Second

// pipeline carries the calls of scripts to the server. Calls that come while others are under way go out together, so
// that thousands of heartbeats cost a few round trips and not a goroutine each.
//
// A batch that hangs must not hold up the calls behind it: after a short delay they go out on another connection. The
// delay grows with the number of batches under way, so that their number lasts until the first of them is given up,
// and a link that works again is found soon.
//
// A call that comes while no other is under way is made by its caller's own goroutine, because handing it to another
// one and back takes a third of a fast round trip. If the answer does not come at once, the call is made again by a
// worker: every script may be repeated.
type pipeline struct {
	client   redis.UniversalClient
	limit    int              // most batches under way
	replicas int              // how many must confirm a durable call
	own      bool             // the client is ours, and obeys the deadline of a ctx
	ordered  bool             // a second batch waits a moment too, so that the next acquire rarely overtakes a release, and finds the vote free
	redirect func(*call) bool // takes over a call that this server has not served, if another may; nil if there is no other

	mu       sync.Mutex
	queue    []*call
	active   int           // workers that send a batch or are about to
	idle     int           // workers that wait for one
	latest   time.Time     // when the latest batch was sent
	patience time.Duration // and how long it may take
	delayed  *time.Timer   // looks again whether one more batch may be sent
	fast     bool          // the latest answer came in good time for a direct call
	batches  int           // that workers have sent and that have no answer
	heard    time.Time     // when the latest of them was answered, or the first of them sent
	closed   bool

	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	work    chan struct{} // wakes an idle worker
	workers sync.WaitGroup
}

// call is one call of a script. Its caller fills in the upper half, a worker the lower before it closes done.
type call struct {
	script  script
	key     string
	args    []any
	durable bool // wants the replicas to confirm
	relayed bool // another call is likely to follow at once, and had best go out together with this one

	deadline time.Time // of the caller; may be zero

	start     time.Time // just before it was sent
	sent      int       // how often; more than one copy may then be on its way
	reply     any
	err       error
	confirmed bool // false if durable and too few replicas confirmed
	done      chan struct{}
	dropped   atomic.Bool // nobody waits for the answer

	way *way // in a cluster

	// A call that goes to several servers at once comes back here, instead of closing done.
	to   chan<- *call // has room for it
	node *node
}

// finished hands a call back.
func (c *call) finished() {
	if c.to != nil {
		c.to <- c
	} else {
		close(c.done)
	}
}

func newPipeline(client redis.UniversalClient, own bool, limit, replicas int) *pipeline {
	p := &pipeline{client: client, own: own, limit: limit, replicas: replicas, work: make(chan struct{}, maxIdle)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.delayed = time.AfterFunc(time.Hour, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.dispatch()
	})
	p.delayed.Stop()
	return p
}

// do makes a call and returns its error, which is ctx's error if ctx ended first. A call that ctx ends before it was
// sent is never sent.
func (p *pipeline) do(ctx context.Context, c *call) error {
	if c.relayed && p.offer(ctx, c) {
		return p.finish(ctx, c)
	}
	if p.direct(ctx, c) {
		return p.result(ctx, c)
	}
	return p.queued(ctx, c)
}

// queued makes a call by a worker.
func (p *pipeline) queued(ctx context.Context, c *call) error {
	if err := p.begin(ctx, c); err != nil {
		return err
	}
	return p.finish(ctx, c)
}

// offer leaves a call in the queue for a moment, for the call that is likely to follow to take it along. It reports
// whether that has happened.
func (p *pipeline) offer(ctx context.Context, c *call) bool {
	if ctx.Err() != nil {
		return false
	}
	c.deadline, _ = ctx.Deadline()
	c.done = make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.active > 0 || !p.fast || p.closed || len(p.queue) > 0 {
		return false
	}
	p.queue = append(p.queue, c)
	for begun := time.Now(); len(p.queue) > 0 && p.queue[0] == c; {
		if time.Since(begun) > offerTime {
			p.queue = p.queue[1:]
			return false
		}
		p.mu.Unlock()
		runtime.Gosched()
		p.mu.Lock()
	}
	return true
}

// direct makes a call at once, with those that are offered, if no other is under way and the answer is likely to come
// quickly. It reports whether there is a result.
func (p *pipeline) direct(ctx context.Context, c *call) bool {
	deadline, ok := ctx.Deadline()
	if ok && time.Until(deadline) < directPatience || ctx.Err() != nil || c.durable && p.replicas > 0 {
		return false // that of replicas takes longer
	}
	p.mu.Lock()
	if p.active > 0 || !p.fast || p.closed {
		p.mu.Unlock()
		return false
	}
	p.active++
	p.workers.Add(1)
	defer p.workers.Done()
	now := time.Now()
	p.latest, p.patience = now, directPatience
	offered := p.queue
	p.queue = nil
	p.mu.Unlock()

	p.send(withDeadline{p.ctx, now.Add(directPatience)}, append(offered, c))

	p.mu.Lock()
	defer p.mu.Unlock()
	p.active--
	p.fast = c.err == nil
	for _, o := range offered {
		if p.goesOn(o) && !p.closed && !o.dropped.Load() {
			p.queue = append(p.queue, o)
		} else {
			o.finished()
		}
	}
	p.dispatch()
	return !p.goesOn(c)
}

// goesOn reports whether a call that was made directly is to be made by a worker, who has more time and knows other servers.
func (p *pipeline) goesOn(c *call) bool {
	return isTimeout(c.err) || p.redirect != nil && c.err != nil
}

// begin queues a call without waiting for its answer.
func (p *pipeline) begin(ctx context.Context, c *call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.deadline, _ = ctx.Deadline()
	c.done = make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return locker.ErrClosed
	}
	p.queue = append(p.queue, c)
	p.dispatch()
	return nil
}

// hangs tells whether nothing has come from the server for a while, although it was asked.
func (p *pipeline) hangs() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.batches > 0 && time.Since(p.heard) > hungAfter
}

// post queues a call that comes back over its channel, by its deadline or soon after. If it cannot be sent by then it is not
// sent at all.
func (p *pipeline) post(c *call) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.err = locker.ErrClosed
		c.finished()
		return
	}
	p.queue = append(p.queue, c)
	p.dispatch()
}

// finish waits for the answer to a call.
func (p *pipeline) finish(ctx context.Context, c *call) error {
	select {
	case <-c.done:
	case <-ctx.Done():
		p.drop(c)
		return ctx.Err()
	}
	return p.result(ctx, c)
}

// result is the error of a call that has been answered.
func (p *pipeline) result(ctx context.Context, c *call) error {
	if c.err == nil {
		return nil
	}
	if p.ctx.Err() != nil {
		return locker.ErrClosed
	}
	// Another time-out than the caller's must not look like it.
	if err := ended(ctx); err != nil {
		return err
	}
	if isTimeout(c.err) {
		return fmt.Errorf("the server did not answer within %v", time.Since(c.start).Round(time.Millisecond))
	}
	return c.err
}

// ended is ctx's error, also when its deadline has come and it does not know yet.
func ended(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// isTimeout reports whether a client library's error means that time ran out.
func isTimeout(err error) bool {
	if err == nil {
		return false // of nearly all calls
	}
	var netErr net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, &netErr) && netErr.Timeout()
}

// drop takes a call out of the queue, unless it is on its way: then it is not sent again.
func (p *pipeline) drop(c *call) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.dropped.Store(true)
	p.queue = slices.DeleteFunc(p.queue, func(queued *call) bool { return queued == c })
}

// requeue queues a call that another server has not served. It answers false if that makes no sense any more.
func (p *pipeline) requeue(c *call) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.queue = append(p.queue, c)
	p.dispatch()
	return true
}

// dispatch wakes or starts a worker for what is queued, now or when the batches under way have become slow. It is
// called with mu held.
func (p *pipeline) dispatch() {
	if len(p.queue) == 0 || p.closed || p.active >= p.limit {
		return // a worker that ends its batch looks here again
	}
	if p.active >= 2 || p.active == 1 && p.ordered {
		delay := min(firstDelay<<p.active>>2, p.patience/time.Duration(p.limit))
		if wait := delay - time.Since(p.latest); wait > 0 {
			p.delayed.Reset(wait)
			return
		}
	}
	p.active++
	if p.idle > 0 {
		p.idle--
		p.work <- struct{}{}
		return
	}
	p.workers.Go(p.serve)
}

// serve is a worker: it sends what is queued until nothing is left.
func (p *pipeline) serve() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for len(p.queue) > 0 && !p.closed {
			batch := p.take()
			if len(batch) == 0 {
				continue
			}
			if p.batches++; p.batches == 1 {
				p.heard = p.latest
			}
			ctx, cancel := p.bounded(p.patience)
			p.mu.Unlock()
			p.send(ctx, batch)
			cancel()
			good, began := batch[0].err == nil, batch[0].start
			for _, c := range batch {
				if c.err == nil || p.redirect == nil || !p.redirect(c) {
					c.finished()
				}
			}
			p.mu.Lock()
			if p.batches--; good {
				p.heard = time.Now()
			}
			p.fast = p.own && good && time.Since(began) < directPatience/4
		}
		p.active--
		if p.closed || p.idle == maxIdle {
			return
		}
		p.idle++
		p.mu.Unlock()
		_, ok := <-p.work
		p.mu.Lock()
		if !ok {
			return
		}
	}
}

// bounded makes the ctx of a batch. Our own clients need no timer for it.
func (p *pipeline) bounded(patience time.Duration) (context.Context, context.CancelFunc) {
	if p.own {
		return withDeadline{p.ctx, time.Now().Add(patience)}, func() {}
	}
	return context.WithTimeout(p.ctx, patience)
}

// take removes the next batch from the queue. It is called with mu held.
func (p *pipeline) take() []*call {
	var batch []*call
	p.expire()
	if len(p.queue) <= maxBatch {
		batch, p.queue = p.queue, nil
	} else {
		batch, p.queue = p.queue[:maxBatch:maxBatch], p.queue[maxBatch:]
	}
	p.latest, p.patience = time.Now(), minPatience
	for _, c := range batch {
		patience := defaultPatience
		if !c.deadline.IsZero() {
			patience = c.deadline.Sub(p.latest)
		}
		p.patience = max(p.patience, min(patience, maxPatience))
	}
	p.dispatch()
	return batch
}

// expire hands back posted calls whose time is over. It is called with mu held.
func (p *pipeline) expire() {
	now := time.Now()
	over := func(c *call) bool { return c.to != nil && now.After(c.deadline) }
	if !slices.ContainsFunc(p.queue, over) {
		return
	}
	p.queue = slices.DeleteFunc(p.queue, func(c *call) bool {
		if !over(c) {
			return false
		}
		c.err = context.DeadlineExceeded
		c.finished()
		return true
	})
}

// send makes the calls of a batch. A server that does not know a script, because it was restarted, promoted or told to
// forget them, is sent its source.
func (p *pipeline) send(ctx context.Context, batch []*call) {
	start := time.Now()
	for _, c := range batch {
		c.start = start
		c.sent++
	}
	p.exec(ctx, batch, func(client redis.Cmdable, c *call) *redis.Cmd {
		return client.EvalSha(ctx, c.script.sha, []string{c.key}, c.args...)
	})
	var unknown []*call
	for _, c := range batch {
		if c.err != nil && redis.HasErrorPrefix(c.err, "NOSCRIPT") {
			unknown = append(unknown, c)
		}
	}
	if len(unknown) > 0 {
		p.exec(ctx, unknown, func(client redis.Cmdable, c *call) *redis.Cmd {
			return client.Eval(ctx, c.script.source, []string{c.key}, c.args...)
		})
	}
}

// exec makes calls in one round trip, followed by the replicas' confirmation on the same connection if one of them
// asks for it.
func (p *pipeline) exec(ctx context.Context, batch []*call, eval func(redis.Cmdable, *call) *redis.Cmd) {
	durable := false
	for _, c := range batch {
		durable = durable || c.durable && p.replicas > 0
	}
	if len(batch) == 1 && !durable && !batch[0].asks() {
		c := batch[0]
		c.reply, c.err = eval(p.client, c).Result()
		c.confirmed = true
		return
	}
	pipe := p.client.Pipeline()
	cmds := make([]*redis.Cmd, len(batch))
	for i, c := range batch {
		if c.asks() {
			pipe.Do(ctx, "asking")
		}
		cmds[i] = eval(pipe, c)
	}
	var confirmed *redis.Cmd
	if durable {
		confirmed = pipe.Do(ctx, "wait", p.replicas, replicaTimeout.Milliseconds())
	}
	_, err := pipe.Exec(ctx)
	enough := true
	var unknown error // whether the replicas have confirmed
	if durable {
		var n int
		n, unknown = confirmed.Int()
		enough = n >= p.replicas
	}
	for i, c := range batch {
		c.reply, c.err = cmds[i].Result()
		switch {
		case c.err == nil && c.reply == nil: // no connection: go-redis leaves the calls as they were
			c.err = err
		case c.err == nil && c.durable: // the answer to the call alone does not count
			c.err = unknown
		}
		c.confirmed = enough
	}
}

// wait waits for the workers, after close.
func (p *pipeline) wait() { p.workers.Wait() }

// close refuses further calls and ends those that were not sent. The workers end with what they have sent.
func (p *pipeline) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.delayed.Stop()
	p.cancel()
	for _, c := range p.queue {
		c.err = locker.ErrClosed
		c.finished()
	}
	p.queue = nil
	close(p.work)
}
