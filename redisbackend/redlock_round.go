package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/fec20105/locker"
)

const (
	// straggle is how long the rest of the servers may take when most have answered and that does not decide. Where
	// those needed longer than that, it is as long again.
	straggle = 500 * time.Millisecond
	// soon is how long they may take when the call is decided and more answers are only of use.
	soon = 50 * time.Millisecond
	// sendBy is how long a call may wait for a server that hangs: then it is not sent any more.
	sendBy = 5 * time.Second
)

// round is one question to all servers. Answers come as they come; those that nobody waits for any more are dropped.
type round struct {
	redlock  *Redlock
	began    time.Time // before anything was sent
	answers  chan *call
	open     int // calls without an answer
	majority int // answers until the rest are stragglers
	late     *time.Timer
	straggle time.Duration
}

// askAbout sends one and the same question to all servers. Those that hang get it only if the others are too few: they would be
// sent thousands of questions by the time they go on. When what is under way to one of them is answered or given up, it
// is asked again.
func (r *Redlock) askAbout(ctx context.Context, key string, s script, args ...any) *round {
	hung := make([]bool, len(r.nodes))
	answering := 0
	for i, n := range r.nodes {
		if hung[i] = n.pipeline.hangs(); !hung[i] {
			answering++
		}
	}
	state := stateKey(r.prefix, key)
	return r.ask(ctx, func(n *node) *call {
		if hung[n.index] && answering >= r.quorum {
			return nil
		}
		return &call{script: s, key: state, args: args}
	})
}

// ask sends a call to each of the nodes for which there is one.
func (r *Redlock) ask(ctx context.Context, callFor func(*node) *call) *round {
	rd := &round{redlock: r, began: time.Now(), answers: make(chan *call, 4*len(r.nodes)), majority: r.quorum, straggle: straggle}
	for _, n := range r.nodes {
		if c := callFor(n); c != nil {
			rd.post(ctx, n, c)
		}
	}
	return rd
}

// post sends one more call within the round.
func (rd *round) post(ctx context.Context, n *node, c *call) {
	c.node, c.to = n, rd.answers
	c.deadline = time.Now().Add(sendBy)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(c.deadline) {
		c.deadline = deadline
	}
	rd.open++
	n.pipeline.post(c)
}

// next waits for an answer. It answers nil without an error when it makes no sense to wait for more: all have answered, or
// most have, and the others had their time.
func (rd *round) next(ctx context.Context) (*call, error) {
	if rd.open == 0 {
		return nil, nil
	}
	var late <-chan time.Time
	if rd.majority <= 0 {
		if rd.late == nil {
			rd.late = time.NewTimer(max(rd.straggle, time.Since(rd.began)))
		}
		late = rd.late.C
	}
	select {
	case c := <-rd.answers:
		rd.open--
		rd.majority--
		return c, nil
	default:
	}
	select {
	case c := <-rd.answers:
		rd.open--
		rd.majority--
		return c, nil
	case <-late:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-rd.redlock.closed:
		return nil, locker.ErrClosed
	}
}

// decided says that the answers until now are enough. Others are waited for only if they come soon.
func (rd *round) decided() {
	if rd.late == nil {
		rd.late = time.NewTimer(soon)
		rd.majority = 0
	}
}

// tooFew is the error of a call that fewer servers have answered than are needed.
func (r *Redlock) tooFew(ctx context.Context, answered int, errs []error) error {
	if err := ended(ctx); err != nil {
		return err
	}
	if hung := len(r.nodes) - answered - len(errs); hung > 0 {
		errs = append(errs, fmt.Errorf("%d did not answer in time", hung))
	}
	return fmt.Errorf("%d of %d servers took part, and %d are needed: %w", answered, len(r.nodes), r.quorum, errors.Join(errs...))
}

// failed is the error of one server.
func failed(c *call) error {
	if isTimeout(c.err) {
		return fmt.Errorf("%s: no answer in time", c.node.addr) // the caller's own time-out must not look like it
	}
	return fmt.Errorf("%s: %w", c.node.addr, c.err)
}

func isNetwork(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr) || isTimeout(err) || errors.Is(err, io.EOF)
}
