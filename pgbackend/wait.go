package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/fec20105/locker"
)

// Those who wait stand at the gate of their lock, in the server's own queue, on sessions that hold nothing else. Who has the gate
// waits for the lock, and lets it go at once: a waiter that has died meanwhile passes it on. Then the lock is asked for on the session
// that will hold it, before the gate is opened for the next; all others fail as long as somebody wants the gate.
const (
	slice     = 500 * time.Millisecond // the longest that one statement waits
	leastTurn = 20 * time.Millisecond  // the same where many keys take turns
	gateIdle  = 700 * time.Millisecond // after which the server ends a waiter that keeps the gate and does nothing
	spareIdle = 30 * time.Second       // the same for one that waits for nothing
	fallback  = slice + gateIdle + 300*time.Millisecond
	late      = 300 * time.Millisecond // by how much an answer may be late before a waiter counts as lost
	keepSpare = 10 * time.Second       // for which an unused waiter is kept
)

// waiters are the sessions that wait.
type waiters struct {
	running int
	idle    []*waiter
	ready   []*entry // that want a waiter
}

// waiter is one of them, and the goroutine that uses it.
type waiter struct {
	backend *Backend
	session *session
	awake   bool          // its session has gateIdle
	opening bool          // whom it has let in holds the lock, or is about to
	next    chan *entry   // what to wait for
	cancel  chan struct{} // nobody wants what it waits for; room for one
	left    []*grant      // that have left the queue which it serves
}

// queue lets a request wait, behind the others or before them.
func (b *Backend) queue(e *entry, g *grant, first bool) {
	g.state = queued
	if first {
		e.queue = slices.Insert(e.queue, 0, g)
	} else {
		e.queue = append(e.queue, g)
	}
	b.list(e)
}

// list finds a waiter for a key for which requests wait.
func (b *Backend) list(e *entry) {
	if len(e.queue) == 0 || e.server != nil || e.listed || e.offered || b.closed || e.owner != nil && e.owner.state == asking {
		return
	}
	ws := &b.waiters
	e.listed = true
	switch n := len(ws.idle); {
	case n > 0:
		w := ws.idle[n-1]
		ws.idle = ws.idle[:n-1]
		w.next <- e
	case ws.running < b.opts.Waiters:
		ws.running++
		w := &waiter{backend: b, next: make(chan *entry, 1), cancel: make(chan struct{}, 1)}
		w.next <- e
		b.spawnLocked(w.run)
	default:
		ws.ready = append(ws.ready, e)
	}
}

// unqueue takes a request out that nobody wants any more.
func (b *Backend) unqueue(g *grant) {
	e := b.keys[g.req.Key]
	e.queue = slices.DeleteFunc(e.queue, func(other *grant) bool { return other == g })
	b.answer(g, errWithdrawn)
	if len(e.queue) > 0 || e.server == nil {
		b.settle(g, false)
		b.tidy(e)
		return
	}
	e.server.left = append(e.server.left, g) // settled when the gate is open again
	select {
	case e.server.cancel <- struct{}{}:
	default:
	}
}

// run waits for one key after the other.
func (w *waiter) run() {
	b := w.backend
	spare := time.NewTimer(keepSpare)
	defer spare.Stop()
	for {
		var e *entry
		select {
		case e = <-w.next:
		default:
			w.sleep()
			spare.Reset(keepSpare)
			select {
			case e = <-w.next:
			case <-spare.C:
			case <-b.ctx.Done():
			}
		}
		if e != nil && b.ctx.Err() == nil {
			w.serve(e)
		}
		b.mu.Lock()
		ws := &b.waiters
		switch {
		case b.closed, e == nil && len(w.next) == 0:
			ws.running--
			ws.idle = slices.DeleteFunc(ws.idle, func(other *waiter) bool { return other == w })
			b.mu.Unlock()
			w.end()
			return
		case e == nil: // found work at the last moment
		case len(ws.ready) > 0:
			w.next <- ws.ready[0]
			ws.ready = ws.ready[1:]
		default:
			ws.idle = append(ws.idle, w)
		}
		b.mu.Unlock()
	}
}

// sleep lets an unused session live longer.
func (w *waiter) sleep() {
	if w.session == nil || !w.awake {
		return
	}
	w.awake = false
	_, _ = w.session.send(setIdle(spareIdle), nil) // one that has ended is replaced
}

// end closes the session.
func (w *waiter) end() {
	if s := w.session; s != nil {
		w.session = nil
		s.close()
		w.backend.drop(s)
	}
}

// ensure opens a session if there is none. What is sent next finds it with gateIdle.
func (w *waiter) ensure() error {
	if w.session == nil || !w.session.alive() {
		w.end()
		s, err := w.backend.connect(w.backend.ctx, waiting, gateIdle)
		if err != nil {
			return err
		}
		if !w.backend.adopt(s) {
			return locker.ErrClosed
		}
		w.session, w.awake = s, false
	}
	if w.awake {
		return nil
	}
	w.awake = true
	_, err := w.session.enqueue(setIdle(gateIdle), nil)
	return err
}

// serve waits for a key until one of this process has got it, nobody wants it any more, or others have waited for long
// enough for their turn.
func (w *waiter) serve(e *entry) {
	b := w.backend
	b.mu.Lock()
	e.listed, e.server = false, w
	select {
	case <-w.cancel: // meant for an earlier key
	default:
	}
	b.mu.Unlock()
	gate, opened := false, make(chan struct{})
	for {
		b.mu.Lock()
		w.opening = false
		wanted, turns := len(e.queue) > 0, len(b.waiters.ready)
		b.mu.Unlock()
		if !wanted {
			break
		}
		err := w.ensure()
		if err != nil && w.session == nil {
			w.failAll(e, err)
			break
		}
		var free bool
		if err == nil {
			free, gate, err = w.turn(e, gate, max(leastTurn, slice/time.Duration(1+turns)))
		}
		if err != nil {
			w.lose()
			gate = false
			if b.ctx.Err() != nil {
				break
			}
			free = true // perhaps; and if not, it costs one question
		}
		if free {
			statement, behind := "locker_take", opened
			if !gate {
				statement, behind = "locker_ask", nil
			}
			if b.askFirst(e, statement, behind) {
				break
			}
		} else if turns > 0 {
			break
		}
	}
	w.open(gate)
	close(opened)
	b.mu.Lock()
	defer b.mu.Unlock()
	e.server = nil
	for _, g := range w.left {
		b.settle(g, false)
	}
	w.left = nil
	b.list(e)
	b.tidy(e)
}

// turn waits for the gate, unless it has it, and then for the lock, for one slice. The lock is let go by the server at the
// statement's end. Time-outs are caught at the server, so that its log does not fill with them.
func (w *waiter) turn(e *entry, gate bool, d time.Duration) (opened, hasGate bool, err error) {
	s, space := w.session, spaceOf(w.backend.opts.Prefix, e.key)
	atGate := ""
	if !gate {
		atGate = fmt.Sprintf("PERFORM pg_advisory_lock(%d);", space.gate)
	}
	sql := fmt.Sprintf("DO $$DECLARE gate bool := %t; BEGIN "+
		"IF pg_backend_pid() <> %s THEN RAISE 'the session has moved'; END IF; "+
		"PERFORM set_config('lock_timeout', '%d', true); %s gate := true; PERFORM pg_advisory_xact_lock(%d); "+
		"EXCEPTION WHEN lock_not_available OR query_canceled THEN RAISE INFO '%%', gate; END$$",
		gate, s.pid, millis(d), atGate, space.lock)
	w.backend.mu.Lock()
	if len(e.queue) == 0 { // a request that is withdrawn from now on cancels the statement
		w.backend.mu.Unlock()
		return false, gate, nil
	}
	st, err := s.enqueue(sql, nil)
	w.backend.mu.Unlock()
	if err != nil {
		return false, false, err
	}
	s.flush()
	limit := time.NewTimer(2*d + late)
	defer limit.Stop()
	select {
	case <-st.done:
	case <-limit.C:
		return false, false, errors.New("the server does not answer")
	case <-w.backend.ctx.Done():
		return false, false, locker.ErrClosed
	case <-w.cancel:
		if err := w.interrupt(st); err != nil {
			return false, false, err
		}
	}
	switch {
	case st.err != nil && s.fate() == nil:
		w.open(true) // whatever it has got
		return false, false, st.err
	case st.err != nil:
		return false, false, st.err
	case st.notice == "":
		return true, true, nil
	case st.notice == "t":
		return false, true, nil
	}
	w.open(true) // the time-out may have come when the gate had been got
	return false, false, nil
}

// interrupt ends a statement for which nobody waits.
func (w *waiter) interrupt(st *statement) error {
	ctx, cancel := context.WithTimeout(w.backend.ctx, slice+late)
	defer cancel()
	// An answer says that the signal has been sent, so it does not hit a later statement.
	_, err := w.backend.askControl(ctx, "SELECT pg_cancel_backend("+w.session.pid+")")
	if err != nil {
		w.backend.opts.Logger.DebugContext(ctx, "a waiting statement could not be cancelled", "error", err)
	}
	if _, waitErr := st.wait(ctx); waitErr != nil && ctx.Err() != nil {
		return waitErr
	}
	return nil
}

// open opens the gate, and whatever else the session may have got.
func (w *waiter) open(gate bool) {
	if !gate || w.session == nil {
		return
	}
	ctx, cancel := context.WithTimeout(w.backend.ctx, slice)
	defer cancel()
	for try := 0; ; try++ {
		_, err := w.session.ask(ctx, "SELECT pg_advisory_unlock_all()")
		const canceled = "57014" // a cancel was late after all
		if err == nil || codeOf(err) != canceled || try > 3 {
			if err != nil {
				w.lose()
			}
			return
		}
	}
}

// lose gives up a session that may keep the gate, and sees to it that the server ends it.
func (w *waiter) lose() {
	s := w.session
	if s == nil {
		return
	}
	w.session = nil
	s.close()
	w.backend.drop(s)
	if s.certain() {
		return
	}
	resolved := make(chan struct{})
	w.backend.spawn(func() {
		defer close(resolved)
		w.backend.resolve(s)
	})
	limit := time.NewTimer(gateIdle)
	defer limit.Stop()
	select {
	case <-s.gone:
	case <-resolved:
	case <-limit.C:
	case <-w.backend.ctx.Done():
	}
}

// askFirst asks for the lock for the first of those who wait, and tells whether it has got it or there is none. Who asks from
// behind a gate tells with a channel when that is open again.
func (b *Backend) askFirst(e *entry, prepared string, behind chan struct{}) (done bool) {
	b.mu.Lock()
	if len(e.queue) == 0 {
		b.mu.Unlock()
		return true
	}
	if e.owner != nil {
		end := e.owner.end()
		b.mu.Unlock()
		// The server has freed what this process still counts as held: the news of that is on its way.
		pause := time.NewTimer(5 * time.Millisecond)
		defer pause.Stop()
		select {
		case <-end:
		case <-pause.C:
		case <-b.ctx.Done():
		}
		return false
	}
	g := e.queue[0]
	e.queue = e.queue[1:]
	e.owner = g
	g.state, g.behind = asking, behind
	e.server.opening = true
	b.mu.Unlock()
	asked := make(chan struct{})
	if err := b.question(b.ctx, g, prepared, asked); err != nil {
		return false // g knows
	}
	select {
	case <-asked:
	case <-b.ctx.Done():
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return g.state != queued
}

// failAll tells those who wait that it cannot be done.
func (w *waiter) failAll(e *entry, err error) {
	b := w.backend
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, g := range e.queue {
		b.answer(g, err)
		b.settle(g, false)
	}
	e.queue = nil
}
