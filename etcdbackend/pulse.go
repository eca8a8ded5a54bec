package etcdbackend

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// streamLife is how long a stream that does not answer is listened to.
	streamLife = 15 * time.Second
	// streamPatience is how long a keepalive may be unanswered before the next one takes another stream, which the
	// client library opens to another member where there are several.
	streamPatience = 400 * time.Millisecond
)

var errStream = errors.New("the stream of keepalives was closed by the server")

// pulse sends the keepalives of all leases over one stream. The client library's own KeepAliveOnce opens a stream for each,
// for which a server with users wants a password checked every time; its KeepAlive counts from the answer.
type pulse struct {
	client pb.LeaseClient
	ctx    context.Context // of the Backend
	work   *sync.WaitGroup

	mu      sync.Mutex
	current *stream
}

// stream is one stream of keepalives. The server answers them in the order in which they were sent.
type stream struct {
	cancel context.CancelFunc
	send   chan struct{} // has room for one: there is something to send

	// Of pulse.mu.
	queued  []*beat     // not sent yet
	sent    []*beat     // not answered yet
	err     error       // it has ended
	retired *time.Timer // not nil: it gets no more beats, and is closed when they are answered or the timer fires
}

// beat is one keepalive. It may be on its way on several streams: the first answer counts.
type beat struct {
	id    clientv3.LeaseID
	asked time.Time
	done  chan struct{}
	// Of pulse.mu, and not changed any more once done is closed.
	streams  int     // that may answer it
	latest   *stream // of them
	answered bool
	ttl      time.Duration // zero: there is no such lease
	term     uint64        // of the leader's reign in which it was answered
	err      error         // not known
}

func newPulse(ctx context.Context, client pb.LeaseClient, work *sync.WaitGroup) *pulse {
	return &pulse{client: client, ctx: ctx, work: work}
}

// begin sends a keepalive. What counts as its moment is the one before the call.
func (p *pulse) begin(id clientv3.LeaseID) *beat {
	b := &beat{id: id, asked: time.Now(), done: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enqueue(b)
	return b
}

// answeredYet tells whether the answer is there.
func (p *pulse) answeredYet(b *beat) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return b.answered
}

// again sends a keepalive that was not answered once more, if there is a better stream by now or there can be one.
func (p *pulse) again(b *beat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !b.answered && (b.latest != p.current || p.current.late(time.Now())) {
		p.enqueue(b)
	}
}

// enqueue is called with p.mu held.
func (p *pulse) enqueue(b *beat) {
	if s := p.current; s == nil || s.err != nil || s.late(time.Now()) {
		if s != nil && s.err == nil {
			s.retired = time.AfterFunc(streamLife, s.cancel)
		}
		p.current = p.open()
	}
	b.streams++
	b.latest = p.current
	p.current.queued = append(p.current.queued, b)
	select {
	case p.current.send <- struct{}{}:
	default:
	}
}

// answer is called with p.mu held.
func (b *beat) answer(ttl time.Duration, term uint64, err error) {
	b.streams--
	if b.answered || err != nil && b.streams > 0 {
		return
	}
	b.answered, b.ttl, b.term, b.err = true, ttl, term, err
	close(b.done)
}

// wait waits for the answer, and tries other streams meanwhile.
func (p *pulse) wait(ctx context.Context, b *beat) error {
	select {
	case <-b.done:
		return b.err
	default:
	}
	patience := time.NewTimer(streamPatience)
	defer patience.Stop()
	for {
		select {
		case <-b.done:
			return b.err
		case <-patience.C:
			p.again(b)
			patience.Reset(streamPatience)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// late tells whether the oldest keepalive has waited for too long.
func (s *stream) late(now time.Time) bool {
	oldest := now
	if len(s.queued) > 0 {
		oldest = s.queued[0].asked
	}
	if len(s.sent) > 0 {
		oldest = s.sent[0].asked
	}
	return now.Sub(oldest) > streamPatience
}

// open starts a stream. It is called with p.mu held.
func (p *pulse) open() *stream {
	ctx, cancel := context.WithCancel(p.ctx)
	s := &stream{cancel: cancel, send: make(chan struct{}, 1)}
	p.work.Go(func() {
		defer cancel()
		remote, err := p.client.LeaseKeepAlive(clientv3.WithRequireLeader(ctx))
		if err != nil {
			p.end(s, err)
			return
		}
		received := make(chan struct{})
		go func() {
			defer close(received)
			defer cancel()
			p.receive(s, remote)
		}()
		p.transmit(ctx, s, remote)
		<-received
	})
	return s
}

// transmit sends what is queued until the stream ends.
func (p *pulse) transmit(ctx context.Context, s *stream, remote pb.Lease_LeaseKeepAliveClient) {
	for {
		select {
		case <-s.send:
		case <-ctx.Done():
			return
		}
		for {
			p.mu.Lock()
			if len(s.queued) == 0 || s.err != nil {
				p.mu.Unlock()
				break
			}
			b := s.queued[0]
			s.queued = s.queued[1:]
			s.sent = append(s.sent, b)
			p.mu.Unlock()
			if err := remote.Send(&pb.LeaseKeepAliveRequest{ID: int64(b.id)}); err != nil {
				return // receive knows why
			}
		}
	}
}

// receive takes the answers until the stream ends.
func (p *pulse) receive(s *stream, remote pb.Lease_LeaseKeepAliveClient) {
	for {
		resp, err := remote.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errStream
			}
			p.end(s, err)
			return
		}
		p.mu.Lock()
		if len(s.sent) == 0 || int64(s.sent[0].id) != resp.ID {
			p.mu.Unlock()
			p.end(s, errStream)
			return
		}
		b := s.sent[0]
		s.sent = s.sent[1:]
		b.answer(time.Duration(resp.TTL)*time.Second, resp.GetHeader().GetRaftTerm(), nil)
		idle := s.retired != nil && len(s.queued)+len(s.sent) == 0
		p.mu.Unlock()
		if idle {
			s.cancel()
		}
	}
}

// end answers what is left that its outcome is not known.
func (p *pulse) end(s *stream, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.err = err
	if s.retired != nil {
		s.retired.Stop()
	}
	for _, b := range append(s.sent, s.queued...) {
		b.answer(0, 0, err)
	}
	s.sent, s.queued = nil, nil
}
