package etcdbackend

import (
	"context"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// confirmEvery is the least time between two questions whether keys are still there: those who come between share one.
	confirmEvery = 20 * time.Millisecond
	// confirmMost is how many keys one question may name: the servers' own default limit for a transaction.
	confirmMost = 128
	// confirmTimeout bounds a question; whoever asks may be gone before.
	confirmTimeout = 10 * time.Second
)

// confirmer asks whether locks are still held, many at a time.
type confirmer struct {
	backend *Backend
	mu      sync.Mutex
	waiting []*question
	last    time.Time // when a question was sent
	planned bool      // one will be sent
}

// question is about one key.
type question struct {
	key      string
	revision int64
	done     chan struct{}
	asker    *confirmer
	batch    *batch // with which it was sent; nil before
	gone     bool   // nobody waits for the answer
	// The answer.
	held bool
	term uint64 // of the leader who answered, or a later one
	err  error
}

// batch is what is asked together. It is cancelled when nobody waits for it any more, and a question for which nobody waits
// is not sent again with the others: no request names a lock that is released.
type batch struct {
	left   int
	cancel context.CancelFunc
	ended  chan struct{}
}

// begin asks whether a key is there with the revision in which it was created. The answer is of a moment after the call.
func (c *confirmer) begin(key string, revision int64) *question {
	q := &question{key: key, revision: revision, done: make(chan struct{}), asker: c}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, q)
	if !c.planned {
		c.planned = true
		c.backend.work.Add(1)
		time.AfterFunc(max(0, confirmEvery-time.Since(c.last)), c.send)
	}
	return q
}

func (q *question) wait(ctx context.Context) error {
	select {
	case <-q.done:
		return q.err
	case <-ctx.Done():
		q.asker.abandon(q)
		return ctx.Err()
	}
}

// abandon returns when the question is not on its way to be sent.
func (c *confirmer) abandon(q *question) {
	c.mu.Lock()
	q.gone = true
	last := false
	if q.batch != nil {
		q.batch.left--
		last = q.batch.left == 0
	}
	c.mu.Unlock()
	if last {
		q.batch.cancel()
		<-q.batch.ended
	}
}

// send asks what has come together.
func (c *confirmer) send() {
	defer c.backend.work.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	questions := slices.DeleteFunc(c.waiting, func(q *question) bool { return q.gone })
	c.waiting, c.planned, c.last = nil, false, time.Now()
	for some := range slices.Chunk(questions, confirmMost) {
		ctx, cancel := context.WithTimeout(c.backend.ctx, confirmTimeout)
		together := &batch{left: len(some), cancel: cancel, ended: make(chan struct{})}
		for _, q := range some {
			q.batch = together
		}
		c.backend.work.Go(func() {
			defer close(together.ended)
			defer cancel()
			c.answer(ctx, some)
		})
	}
}

func (c *confirmer) answer(ctx context.Context, questions []*question) {
	type answer struct {
		to   []*question
		resp *clientv3.TxnResponse
	}
	a, err := ask(ctx, c.backend, func(ctx context.Context) (a answer, err error) {
		var gets []clientv3.Op
		a.to = c.wanted(questions)
		for _, q := range a.to {
			gets = append(gets, clientv3.OpGet(q.key, clientv3.WithKeysOnly()))
		}
		if len(gets) == 0 {
			return a, context.Canceled
		}
		a.resp, err = c.backend.client.Txn(ctx).Then(gets...).Commit()
		return a, err
	})
	for _, q := range questions {
		if q.err = err; err == nil {
			q.err = context.Canceled // unless it was wanted
		}
	}
	if err == nil {
		for i, q := range a.to {
			found := a.resp.Responses[i].GetResponseRange().Kvs
			q.held = len(found) == 1 && found[0].CreateRevision == q.revision
			q.term = a.resp.Header.RaftTerm
			q.err = nil
		}
	}
	for _, q := range questions {
		close(q.done)
	}
}

// wanted are the questions for whose answer somebody waits.
func (c *confirmer) wanted(questions []*question) (wanted []*question) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range questions {
		if !q.gone {
			wanted = append(wanted, q)
		}
	}
	return wanted
}
