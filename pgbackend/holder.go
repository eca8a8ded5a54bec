package pgbackend

import (
	"context"
	"fmt"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/clock"
)

// timer is what leases must have in common to share a session: the server's timer that frees them.
type timer struct {
	ttl   time.Duration
	quiet bool // for leases that are not extended: no heartbeat of others starts the timer again
}

// holder is a session that holds locks. Its fields belong to Backend.mu.
type holder struct {
	*session
	backend *Backend
	timer   timer
	made    time.Time           // when it was ready
	grants  map[*grant]struct{} // that it holds, or that it was asked for
	first   time.Time           // when the first of them came
	empty   time.Time           // when the last of them went
	tick    *time.Timer
	expiry  *time.Timer // looks for leases whose time is over
	due     time.Time   // when it does; zero if there are none
}

// state is where a grant stands.
type state uint8

const (
	asking  state = iota // a session is being asked for it
	queued               // it waits for others
	held                 // it was granted
	freeing              // its release was sent
	orphan               // its session has ended, and may hold it
	over                 // nothing of it is at the server
)

// grant is one request from its Acquire to its end. Its fields belong to Backend.mu. There may be many: it is kept small.
type grant struct {
	req    locker.Request
	space  keyspace
	holder *holder // since it was asked

	state     state
	sawHeld   bool  // by another, when it was asked for
	abandoned bool  // nobody wants it any more
	expired   bool  // freed because its time was over
	tried     bool  // a Release was sent
	leaving   bool  // its release is on its way
	lost      bool  // when it was over, it had been lost before
	passes    uint8 // how often the lock was passed on to come here

	asked    chan struct{} // closed when the session has answered; nil if nobody wants to know
	behind   chan struct{} // closed when the waiter that let it in keeps the gate no more; nil if it came without
	answered chan struct{} // closed, and nil, when Acquire's outcome is known
	err      error         // that outcome

	token uint64
	start clock.Reading // before the last message was sent that started the server's timer again
	turn  time.Duration // when the first of those passed it on had been granted it, by the boot clock

	settled chan struct{} // closed when it is over; nil if nobody wants to know
}

// entry is what this process knows of a key.
type entry struct {
	key    string
	owner  *grant   // that holds it on a session of ours, or asks for it
	queue  []*grant // that wait for it, in the order in which they came
	server *waiter  // that waits for it at the server
	listed bool     // for the next waiter that has time

	leaving uint16 // releases that are on their way
	offers  uint8  // how many more releases may wait for the next request in vain
	offered bool   // its owner's release waits for one: no waiter need be found
}

func (b *Backend) entry(g *grant) *entry {
	e := b.keys[g.req.Key]
	if e == nil {
		e = &entry{key: g.req.Key}
		b.keys[g.req.Key] = e
	}
	return e
}

// tidy forgets a key of which nothing is to be known.
func (b *Backend) tidy(e *entry) {
	if e.owner == nil && len(e.queue) == 0 && e.server == nil && !e.listed && e.leaving == 0 && b.keys[e.key] == e {
		delete(b.keys, e.key)
	}
}

// timer is what the grant asks of its session.
func (g *grant) timer() timer {
	return timer{time.Duration(millis(max(g.req.TTL, minTTL))) * time.Millisecond, g.req.NoExtend}
}

// accepts tells whether a holder takes one more grant.
func (h *holder) accepts() bool {
	if !h.alive() || h.stalled(patience) {
		return false
	}
	// A grant starts the timer of all again; those that are not extended bear that for a moment only.
	return !h.timer.quiet || len(h.grants) == 0 || time.Since(h.first) < h.timer.ttl/8
}

// holderFor returns a session on which a grant can be asked for, and has noted it there. Call it, and send the question,
// without letting go of mu.
func (b *Backend) holderFor(t timer) *holder {
	for _, h := range b.holders[t] {
		if h.accepts() {
			return h
		}
	}
	return nil
}

// openHolder makes one more session for locks.
func (b *Backend) openHolder(ctx context.Context, t timer) error {
	b.mu.Lock()
	o := b.opening[t]
	if o == nil {
		o = &opening{done: make(chan struct{})}
		if b.closed {
			b.mu.Unlock()
			return locker.ErrClosed
		}
		b.opening[t] = o
		b.spawnLocked(func() {
			h, err := b.makeHolder(t)
			b.mu.Lock()
			defer b.mu.Unlock()
			delete(b.opening, t)
			if o.err = err; err == nil {
				b.holders[t] = append(b.holders[t], h)
				h.tick = time.AfterFunc(h.period(), h.look(b))
				h.expiry = time.AfterFunc(forever, h.expire(b))
				if !h.alive() {
					b.spawnLocked(func() { b.holderEnded(h) })
				}
			}
			close(o.done)
		})
	}
	b.mu.Unlock()
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
		return ctx.Err()
	case <-b.ctx.Done():
		return locker.ErrClosed
	}
}

func (b *Backend) makeHolder(t timer) (*holder, error) {
	for try := 0; ; try++ {
		s, err := b.connect(b.ctx, holding, t.ttl)
		if err != nil {
			return nil, err
		}
		if !b.adopt(s) {
			return nil, locker.ErrClosed
		}
		h := &holder{session: s, backend: b, timer: t, grants: make(map[*grant]struct{}), empty: time.Now()}
		s.listen(b.brokenBy(h), func() { b.holderEnded(h) })
		if err = b.prepareHolder(h); err == nil {
			h.made = time.Now()
			return h, nil
		}
		s.close()
		b.drop(s)
		const undefinedTable = "42P01"
		if codeOf(err) != undefinedTable || try > 0 {
			return nil, err
		}
		if err := b.prepareTokens(b.ctx); err != nil { // the sequence is gone with the server's data
			return nil, err
		}
	}
}

// prepareHolder makes a session ready to hold locks. All statements are under way at once.
func (b *Backend) prepareHolder(h *holder) error {
	ctx, cancel := context.WithTimeout(b.ctx, setUp)
	defer cancel()
	var sent []*statement
	for _, sql := range append(b.tokens.Load().holderStatements(), setIdle(h.timer.ttl)) {
		st, err := h.enqueue(sql, nil)
		if err != nil {
			return err
		}
		sent = append(sent, st)
	}
	h.flush()
	for _, st := range sent {
		if _, err := st.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// setIdle is the statement that makes a time the one after which the server ends an idle session.
func setIdle(d time.Duration) string { return fmt.Sprintf("SET idle_session_timeout = %d", millis(d)) }

// drop forgets a session that has ended.
func (b *Backend) drop(s *session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.sessions, s)
}

// period is how often a holder is looked after.
func (h *holder) period() time.Duration { return min(max(h.timer.ttl/3, minTTL/3), 5*time.Second) }

// keptEmpty is how long a session without locks is kept.
func (h *holder) keptEmpty() time.Duration { return min(max(3*h.timer.ttl, time.Second), time.Minute) }

// look keeps an unused session alive for a while, so that the next lock need not wait for a new one, and gives up a session
// that does not answer. Nobody keeps those alive that hold something: their callers do, or the server ends them.
func (h *holder) look(b *Backend) func() {
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.closed || !h.alive() {
			return
		}
		switch unused := len(h.grants) == 0; {
		case h.stalled(max(h.timer.ttl, time.Second)):
			// Nothing sent in the last TTL was answered, so no lease on it can be trusted any more.
			_ = h.conn.Close()
			return
		case unused && time.Since(h.empty) > h.keptEmpty():
			b.remove(h)
			b.spawnLocked(h.close)
			return
		case unused:
			if _, err := h.enqueue("EXECUTE locker_pulse", nil); err == nil {
				b.spawnLocked(h.flush)
			}
		}
		h.tick.Reset(h.period())
	}
}

func (b *Backend) remove(h *holder) {
	hs := b.holders[h.timer]
	for i := range hs {
		if hs[i] == h {
			b.holders[h.timer] = append(hs[:i:i], hs[i+1:]...)
			break
		}
	}
	if len(b.holders[h.timer]) == 0 {
		delete(b.holders, h.timer)
	}
}

// holderEnded tells those whose locks have gone with their session.
func (b *Backend) holderEnded(h *holder) {
	b.mu.Lock()
	b.remove(h)
	delete(b.sessions, h.session)
	h.stop()
	var told []func(locker.Reason)
	for g := range h.grants {
		switch g.state {
		case held:
			if g.req.Lost != nil {
				told = append(told, g.req.Lost)
			}
			fallthrough
		case asking, freeing:
			g.state = orphan
		}
		b.disown(g)
	}
	unresolved := len(h.grants) > 0 && !h.certain() && !b.closed
	b.mu.Unlock()
	for _, lost := range told {
		lost(locker.ReasonDisconnected)
	}
	if unresolved {
		b.resolve(h.session)
	}
	if !h.certain() && len(h.grants) > 0 {
		return // closed
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for g := range h.grants {
		// If a Release was sent: before the end of its time nothing else frees a lock.
		b.settle(g, !g.tried || b.timeIsOver(g))
	}
}

// disown gives up a grant's place as the owner of its key.
func (b *Backend) disown(g *grant) {
	if e := b.keys[g.req.Key]; e != nil && e.owner == g {
		e.owner = nil
		b.list(e) // others may have begun to wait behind it
		b.tidy(e)
	}
}

// landed notes that a release is on its way no more.
func (b *Backend) landed(g *grant) {
	if g.leaving {
		e := b.keys[g.req.Key]
		e.leaving--
		g.leaving = false
		b.tidy(e)
	}
}

// settle ends a grant of which nothing is left at the server.
func (b *Backend) settle(g *grant, lost bool) {
	if g.state == over {
		return
	}
	g.state, g.lost = over, lost
	b.disown(g)
	b.landed(g)
	if b.requests[g.req.ID] == g {
		delete(b.requests, g.req.ID)
	}
	if h := g.holder; h != nil {
		if delete(h.grants, g); len(h.grants) == 0 {
			h.empty = time.Now()
		}
	}
	if g.settled != nil {
		close(g.settled)
	}
}

// end is closed when nothing of a grant is left at the server.
func (g *grant) end() <-chan struct{} {
	if g.settled == nil {
		g.settled = make(chan struct{})
		if g.state == over {
			close(g.settled)
		}
	}
	return g.settled
}

// stop ends what is done now and then. A session that has ended at once had nothing to do yet.
func (h *holder) stop() {
	if h.tick != nil {
		h.tick.Stop()
		h.expiry.Stop()
	}
}

// timeIsOver tells whether the lease's own TTL has passed.
func (b *Backend) timeIsOver(g *grant) bool {
	return g.left(b.clock.Now()) <= 0
}

func (g *grant) left(now clock.Reading) time.Duration {
	return g.timer().ttl - now.Since(g.start.Mono, g.start)
}

// free sends the release of a lock. What is sent afterwards on this session finds it free.
func (b *Backend) free(g *grant) {
	g.state = freeing
	sql := fmt.Sprintf("SELECT pg_advisory_unlock(%d)", g.space.lock)
	if g.token > 0 {
		class, object := g.space.marked(g.token)
		sql = fmt.Sprintf("EXECUTE locker_free(%d, %d, %d)", g.space.lock, class, object)
	}
	_, err := g.holder.enqueue(sql, func(st *statement) {
		if st.err != nil {
			_ = g.holder.conn.Close() // nobody knows what it holds; holderEnded finds out
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.settle(g, st.rows[0][0] != "t" || g.expired)
	})
	if err == nil {
		if e := b.keys[g.req.Key]; e != nil && !g.leaving {
			e.leaving++
			g.leaving = true
		}
		b.disown(g)
	}
}

const (
	forever = 100 * 365 * 24 * time.Hour
	// often is how soon leases are looked for again whose time is over. Each look is at all of a session.
	often = 5 * time.Millisecond
)

// expire frees the locks whose time is over although their session lives on. There is one timer for all of a session, because each
// would cost a tenth of what a lock takes of the heap. A lease that is extended does not set it anew: it looks in vain then.
func (h *holder) expire(b *Backend) func() {
	return func() {
		b.mu.Lock()
		h.due = time.Time{}
		next, now := forever, b.clock.Now()
		for g := range h.grants {
			if g.state != held || b.closed {
				continue
			}
			if left := g.left(now); left > 0 {
				next = min(next, left)
				continue
			}
			g.expired = true
			b.free(g)
		}
		if next < forever {
			h.dueIn(max(next, often))
		}
		b.mu.Unlock()
		h.flush()
	}
}

// dueIn sets the timer that looks for leases whose time is over, unless it is set for a sooner time.
func (h *holder) dueIn(d time.Duration) {
	if due := time.Now().Add(d); h.due.IsZero() || due.Before(h.due) {
		h.due = due
		h.expiry.Reset(d)
	}
}
