package pgbackend

import (
	"fmt"
	"runtime"
	"time"
)

// Goroutines of this process that want the same lock pass it on to each other: the session keeps the lock, and one statement
// gives it a new token, instead of one that frees it, one that asks for it and, where others want it too, a wait at the gate. They do so
// for a short turn only. At its end the lock is let go for whoever waits for it at the server, at the gate or, as LockTx does, without one.
const (
	turn      = 5 * time.Millisecond
	passes    = 8                     // most of one turn
	offerTime = 20 * time.Microsecond // that a release waits for the next request, which is much less than a statement takes
	offers    = 4                     // releases in a row that wait in vain before no more do
)

// offer waits for a moment for the next request for a lock that is about to be released, if such requests came lately. It lets go of mu
// meanwhile. To guess wrong costs a look at what else is ready to run.
func (b *Backend) offer(g *grant) {
	e := b.keys[g.req.Key]
	if e.offers == 0 {
		return
	}
	e.offers--
	e.offered = true
	for begun := time.Now(); g.state == held && len(e.queue) == 0 && time.Since(begun) < offerTime; {
		b.mu.Unlock()
		runtime.Gosched()
		b.mu.Lock()
	}
	e.offered = false
	if g.state != held { // nobody was let wait meanwhile
		b.list(e)
	}
}

// pass releases a lock for the next in this process. It answers false if there is none, or none that can have it.
func (b *Backend) pass(g *grant) bool {
	e, h := b.keys[g.req.Key], g.holder
	served := e.listed || e.server != nil && !e.server.opening
	if len(e.queue) == 0 || served || b.tokens.Load().transactions || e.queue[0].timer() != h.timer || !h.accepts() {
		return false
	}
	next := e.queue[0]
	if g.passes >= passes || b.clock.Now().Boot-g.turn > turn {
		// Both statements go out together, but what the server lets in between is before the next.
		e.offered = true
		b.free(g)
		e.offered = false
		if e.owner != nil || !b.put(next, h, "locker_ask") {
			b.list(e)
			return true
		}
	} else {
		class, object := g.space.marked(g.token)
		sql := fmt.Sprintf("EXECUTE locker_pass(%d, %d, %d, %s)", g.space.mark, class, object, h.pid)
		if _, err := h.enqueue(sql, func(st *statement) { b.passed(g, next, h, st) }); err != nil {
			return false
		}
		g.state = freeing
		next.turn, next.passes, next.behind = g.turn, g.passes+1, g.behind
		b.note(next, h)
	}
	e.queue = e.queue[1:]
	e.owner, e.offers = next, offers
	return true
}

// passed takes in what became of both grants. It runs on the session's reader.
func (b *Backend) passed(g, next *grant, h *holder, st *statement) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case st.err != nil && h.fate() == nil: // the session has the lock as before
		b.free(g)
		b.spawnLocked(h.flush)
		b.leave(next)
		b.refuse(next, st.err)
		return
	case st.err != nil: // holderEnded finds out
	case st.rows[0][0] != "":
		b.settle(g, false)
	default:
		_ = h.conn.Close() // the lock is on another session, if anywhere
		st.err = fmt.Errorf("%w: %s", errSession, poolerCure)
	}
	b.askedLocked(next, h, st)
}
