package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

const (
	// gather is how long a waiter that was woken by one server waits for the others to free the lock too.
	gather = 5 * time.Millisecond
	// splitTries is how often a request that does not wait asks when votes were split among several, and nobody got the lock.
	splitTries = 8
	// splitDelay is the least time until it asks again.
	splitDelay = 2 * time.Millisecond
)

// hold is a request that waits for a lock or holds it. It is the State of its lease.
type hold struct {
	redlock  *Redlock
	began    int64               // by the servers' time: its place in the queues
	attempt  int64               // by which it was granted
	lost     func(locker.Reason) // may be nil
	wake     chan struct{}       // one for each server that says that the turn may have come
	told     atomic.Uint32       // the servers that say that the lock was taken away, as bits
	released atomic.Bool         // and answered
	waited   bool                // it may stand in the queues of servers whose votes were not needed
	loose    map[*node]bool      // servers that had voted, or not answered, when an attempt was over
}

// Acquire implements [locker.Locker].
func (r *Redlock) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, r.fail("acquire", req.Key, err)
	}
	if err := ctx.Err(); err != nil {
		return locker.Lease{}, r.fail("acquire", req.Key, err)
	}
	h := &hold{redlock: r, began: r.propose(), lost: req.Lost, wake: make(chan struct{}, 2*len(r.nodes))}
	if !req.NoWait || req.Lost != nil {
		r.listen(req, h)
	}
	lease, err := r.wait(ctx, req, h)
	if err != nil {
		r.unlisten(req.ID)
		return locker.Lease{}, err
	}
	if req.Lost == nil {
		r.unlisten(req.ID)
	}
	lease.State = h
	return lease, nil
}

// listen registers a request for the notices of all servers.
func (r *Redlock) listen(req locker.Request, h *hold) {
	for _, n := range r.nodes {
		g := &grant{}
		if !req.NoWait {
			g.wake = h.wake
		}
		if req.Lost != nil {
			g.lost = func(reason locker.Reason) { h.tell(n.index, reason) }
		}
		n.notices.add(req.ID, g)
	}
}

func (r *Redlock) unlisten(id string) {
	for _, n := range r.nodes {
		n.notices.remove(id)
	}
}

// tell notes that a server has taken its vote away. The lock is lost when too few votes are left.
func (h *hold) tell(server int, reason locker.Reason) {
	before := h.told.Or(1 << server)
	now := before | 1<<server
	if most := len(h.redlock.nodes) - h.redlock.quorum; bits.OnesCount32(before) <= most && bits.OnesCount32(now) > most {
		h.lost(reason)
	}
}

// wait asks until the lock is granted: when it is woken, when the holder's lease should have ended, and from time to time,
// because messages get lost and those before it vanish.
func (r *Redlock) wait(ctx context.Context, req locker.Request, h *hold) (locker.Lease, error) {
	mode := ""
	if req.NoWait {
		mode = "once"
	}
	p, err := r.poll(ctx, req, h, mode)
	for try := 1; req.NoWait && err == nil && p.split && try < splitTries; try++ {
		if err := h.pause(ctx, rand.N(splitDelay<<try)+splitDelay); err != nil {
			return locker.Lease{}, r.fail("acquire", req.Key, err)
		}
		p, err = r.poll(ctx, req, h, mode)
	}
	switch {
	case err != nil:
		return locker.Lease{}, r.fail("acquire", req.Key, err)
	case p.granted:
		return p.lease, nil
	case req.NoWait:
		r.withdraw(ctx, req, h)
		if p.silent > 0 {
			return locker.Lease{}, r.fail("acquire", req.Key, quarantineError(p.silent))
		}
		return locker.Lease{}, &p.held
	}
	h.waited = true
	delay, answered := p.delay(), time.Now()
	for {
		if err := h.pause(ctx, delay); err != nil {
			return locker.Lease{}, r.fail("acquire", req.Key, p.waited(err))
		}
		pollCtx, cancel := context.WithTimeout(ctx, pollTimeout)
		next, err := r.poll(pollCtx, req, h, "poll")
		cancel()
		switch {
		case err == nil && next.granted:
			return next.lease, nil
		case err == nil:
			p, delay, answered = next, next.delay(), time.Now()
		case ended(ctx) == nil && time.Since(answered) < patience && !errors.Is(err, locker.ErrClosed) && !errors.Is(err, errWithdrawn):
			delay = retryDelay/2 + rand.N(retryDelay)
		case ended(ctx) == nil && errors.Is(err, context.DeadlineExceeded):
			return locker.Lease{}, r.fail("acquire", req.Key, p.waited(fmt.Errorf("the servers did not answer within %v", pollTimeout)))
		default:
			return locker.Lease{}, r.fail("acquire", req.Key, p.waited(err))
		}
	}
}

func quarantineError(silent time.Duration) error {
	return fmt.Errorf("most servers may have forgotten locks, or are used for the first time, and grant nothing for another %v: wait, or ask again then",
		silent.Round(time.Millisecond))
}

// pause waits for the time of the next poll.
func (h *hold) pause(ctx context.Context, delay time.Duration) error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	for woken := 0; woken < h.redlock.quorum; {
		select {
		case <-h.wake:
			if woken++; woken == 1 {
				timer.Reset(min(delay, gather))
			}
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-h.redlock.closed:
			return locker.ErrClosed
		}
	}
	return nil
}

// ballot is what the servers have answered to one attempt.
type ballot struct {
	granted bool
	lease   locker.Lease
	held    locker.HeldError
	number  int64         // the place in the queue
	split   bool          // nobody can have the lock: the votes are spread over several
	silent  time.Duration // if too many servers stay out of votes: until enough of them take part
}

// waited is the error of a wait that ended after this ballot.
func (b *ballot) waited(err error) error {
	if b.silent > 0 {
		return fmt.Errorf("%w while waiting: %w", err, quarantineError(b.silent))
	}
	return fmt.Errorf("%w while waiting: %w", err, &b.held)
}

// delay is the time until the next poll.
func (b *ballot) delay() time.Duration {
	if b.silent > 0 {
		return min(minPoll+rand.N(maxPoll-minPoll), b.silent+rand.N(5*time.Millisecond))
	}
	if b.split {
		return splitDelay * time.Duration(1+rand.N(min(max(b.number, 1), 50)))
	}
	p := position{held: b.held, number: max(b.number, 1)}
	return p.delay()
}

// count is the state of a poll.
type count struct {
	tokens   map[*node]int64 // of the votes that were given
	raised   map[*node]int64 // the tokens that were written back, or are about to be
	greatest int64           // of those
	others   map[string]int  // votes by the requests that have them
	label    map[string]string
	remains  []time.Duration // until a vote may be free, of the servers that take part
	silent   []time.Duration // until a server takes part
	number   int64
	refusals int // to vote, for whatever reason
	over     int // because the request was released or withdrawn
	errs     []error
	answered map[*node]bool
}

// poll asks all servers once for their votes, and gives them back if they are too few.
func (r *Redlock) poll(ctx context.Context, req locker.Request, h *hold, mode string) (*ballot, error) {
	for len(h.wake) > 0 {
		<-h.wake
	}
	h.attempt = r.propose()
	args := []any{req.ID, h.attempt, micros(req.TTL), r.channel, req.Holder, r.marker, r.quarantine, h.began}
	if mode != "" {
		args = append(args, mode)
	}
	v := &count{
		tokens: make(map[*node]int64, len(r.nodes)), answered: make(map[*node]bool, len(r.nodes)),
	}
	rd := r.askAbout(ctx, req.Key, redlockAcquireScript, args...)
	var err error
	for {
		var c *call
		if c, err = rd.next(ctx); c == nil {
			break
		}
		if c.script == redlockRaiseScript {
			if token, ok := c.reply.(int64); c.err == nil && ok && token > 0 {
				v.tokens[c.node] = token
			}
		} else if err = r.take(v, c); err != nil {
			break
		}
		if token, ok := v.majority(r.quorum); ok {
			ttl := fromMicros(micros(req.TTL))
			lease := locker.Lease{Key: req.Key, ID: req.ID, Holder: req.Holder, Token: uint64(token), TTL: ttl, Start: rd.began}
			return &ballot{granted: true, lease: lease}, nil
		}
		if len(v.tokens) >= r.quorum {
			r.raise(ctx, rd, v, req)
		} else if v.refusals > len(r.nodes)-r.quorum && len(v.remains)+v.over >= r.quorum {
			break // most say why
		}
	}
	if err != nil {
		return nil, err // the caller withdraws the request
	}
	r.giveBack(req, h, v, mode)
	return r.outcome(ctx, req, v)
}

// take counts the answer of one server.
func (r *Redlock) take(v *count, c *call) error {
	v.answered[c.node] = true
	if c.err != nil {
		if errors.Is(c.err, locker.ErrClosed) {
			return c.err
		}
		v.errs = append(v.errs, failed(c))
		return nil
	}
	reply := c.reply.([]any)
	c.node.heard(reply[0].(int64))
	code := reply[1].(int64)
	if code <= 0 {
		v.refusals++
	}
	switch code {
	case 0:
		v.remains = append(v.remains, fromMicros(reply[2].(int64)))
		v.number = max(v.number, reply[3].(int64))
		id := reply[4].(string)
		if v.others == nil {
			v.others, v.label = make(map[string]int), make(map[string]string)
		}
		v.others[id]++
		v.label[id] = reply[5].(string)
	case -1:
		v.over++
	case -2:
		v.silent = append(v.silent, fromMicros(reply[2].(int64)))
	case -3:
		v.silent = append(v.silent, fromMicros(r.quarantine))
		c.node.pipeline.post(&call{
			script: redlockBirthScript, key: r.marker, args: r.birthArgs(),
			node: c.node, to: make(chan *call, 1), deadline: time.Now().Add(sendBy),
		})
	default:
		v.tokens[c.node] = code
		v.remains = append(v.remains, 0)
	}
	return nil
}

// majority is the token that most servers have accepted, and none of them is about to leave for a greater one.
func (v *count) majority(quorum int) (token int64, ok bool) {
	if len(v.tokens) < quorum {
		return 0, false
	}
	for _, token := range v.tokens {
		same := 0
		for _, other := range v.tokens {
			if other == token {
				same++
			}
		}
		if same >= quorum && token >= v.greatest {
			return token, true
		}
	}
	return 0, false
}

// raise writes the greatest token back to the servers that voted with a smaller one.
func (r *Redlock) raise(ctx context.Context, rd *round, v *count, req locker.Request) {
	for _, token := range v.tokens {
		v.greatest = max(v.greatest, token)
	}
	if v.raised == nil {
		v.raised = make(map[*node]int64)
		rd.majority, rd.late = r.quorum, nil // a round of its own
	}
	for n, token := range v.tokens {
		if token < v.greatest && v.raised[n] < v.greatest {
			v.raised[n] = v.greatest
			rd.post(ctx, n, &call{script: redlockRaiseScript, key: stateKey(r.prefix, req.Key), args: []any{req.ID, v.greatest}})
		}
	}
}

// giveBack undoes votes that were not enough, those included whose answers are still on their way. It does not wait.
func (r *Redlock) giveBack(req locker.Request, h *hold, v *count, mode string) {
	key := stateKey(r.prefix, req.Key)
	args := []any{req.ID, h.attempt, r.channel, h.began}
	if mode == "once" {
		args = append(args, mode)
	}
	r.ask(context.Background(), func(n *node) *call {
		if _, voted := v.tokens[n]; !voted && v.answered[n] {
			return nil
		}
		if h.loose == nil {
			h.loose = make(map[*node]bool)
		}
		h.loose[n] = true
		return &call{script: redlockYieldScript, key: key, args: args}
	})
}

// withdraw makes sure that nothing of a request is left when its caller is told that the lock is held, and that no late copy gets
// a vote. It waits for servers that answer soon.
func (r *Redlock) withdraw(ctx context.Context, req locker.Request, h *hold) {
	if len(h.loose) == 0 {
		return
	}
	key := stateKey(r.prefix, req.Key)
	rd := r.ask(context.Background(), func(n *node) *call {
		if !h.loose[n] {
			return nil
		}
		return &call{script: releaseScript, key: key, args: []any{req.ID, r.channel}}
	})
	rd.decided()
	for {
		if c, err := rd.next(ctx); c == nil || err != nil {
			return
		}
	}
}

// outcome is what the servers' answers mean when they are no grant.
func (r *Redlock) outcome(ctx context.Context, req locker.Request, v *count) (*ballot, error) {
	taking := len(v.remains)
	switch {
	case v.over > len(r.nodes)-r.quorum:
		return nil, errWithdrawn
	case taking+v.over < r.quorum && taking+v.over+len(v.silent) >= r.quorum:
		slices.Sort(v.silent)
		return &ballot{silent: v.silent[r.quorum-taking-v.over-1]}, nil
	case taking+v.over < r.quorum:
		return nil, r.tooFew(ctx, taking+v.over, v.errs)
	}
	b := &ballot{held: locker.HeldError{Key: req.Key}, number: v.number}
	slices.Sort(v.remains)
	if taking >= r.quorum {
		b.held.Remaining = v.remains[r.quorum-1]
	}
	most := 0
	for id, votes := range v.others {
		if id != "" && votes > most {
			most, b.held.Holder = votes, v.label[id]
		}
	}
	// Votes that were not heard of may all be one request's.
	b.split = v.others[""] == 0 && most+len(r.nodes)-taking < r.quorum
	return b, nil
}

// labelOf takes the attempt off a label.
func labelOf(label string) (attempt int64, own string) {
	for i := range len(label) {
		if label[i] == ' ' {
			attempt, _ = strconv.ParseInt(label[:i], 10, 64)
			return attempt, label[i+1:]
		}
	}
	return 0, label
}
