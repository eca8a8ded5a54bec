package pgbackend

import (
	"context"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// controlSession is the session that holds nothing: it looks, cancels and ends.
type controlSession struct {
	mu      sync.Mutex
	current *session
	opening *opening
}

// opening is a session that is being made, for all who need it.
type opening struct {
	done chan struct{}
	err  error
}

// askControl asks on the control session, which is opened if there is none. A ctx that ends ends the waiting only.
func (b *Backend) askControl(ctx context.Context, sql string) (*statement, error) {
	for try := 0; ; try++ {
		s, err := b.openControl(ctx)
		if err != nil {
			return nil, err
		}
		st, err := s.ask(ctx, sql)
		if err == nil || ctx.Err() != nil || s.fate() == nil || try > 0 {
			return st, err
		}
		// It had ended before, as sessions do that are idle: these statements may be made twice.
	}
}

// openControl returns the control session. One that does not answer is given up.
func (b *Backend) openControl(ctx context.Context) (*session, error) {
	c := &b.control
	for {
		c.mu.Lock()
		if s := c.current; s != nil {
			if s.stalled(patience) {
				_ = s.conn.Close()
				c.current = nil
			} else if s.alive() {
				c.mu.Unlock()
				return s, nil
			}
		}
		o := c.opening
		if o == nil {
			o = &opening{done: make(chan struct{})}
			c.opening = o
			b.spawn(func() {
				s, err := b.connect(b.ctx, control, controlIdle)
				if err == nil && !b.adopt(s) {
					err = locker.ErrClosed
				}
				c.mu.Lock()
				defer c.mu.Unlock()
				if c.opening, o.err = nil, err; err == nil {
					s.listen(nil, func() { b.drop(s) })
					c.current = s
				}
				close(o.done)
			})
		}
		c.mu.Unlock()
		select {
		case <-o.done:
			if o.err != nil {
				return nil, o.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-b.ctx.Done():
			return nil, locker.ErrClosed
		}
	}
}

// patience is how long a session may leave a short statement unanswered before new ones take another.
const patience = 2 * time.Second

// resolve finds out what became of a session that has ended without the server's own word, until it is certain that the
// server's process is gone. It may hold locks, and nobody but the server can tell.
func (b *Backend) resolve(s *session) {
	sql := "SELECT pg_terminate_backend(pid) FROM pg_stat_get_activity(" + s.pid + ") WHERE coalesce(backend_start = " + quoteText(s.started) + ", true)"
	if b.pooled.Load() {
		// The pooler may have given the server's session to somebody else, after it had freed all locks.
		sql = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = " + s.pid
	}
	pause := time.NewTimer(0)
	defer pause.Stop()
	// Each try has more time, for on a link that has become slow no short one would ever be answered.
	for delay, patient := 2*time.Millisecond, patience; ; delay, patient = min(2*delay, time.Second), min(2*patient, 16*patience) {
		select {
		case <-pause.C:
		case <-s.gone:
			return
		case <-b.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(b.ctx, patient)
		st, err := b.askControl(ctx, sql)
		cancel()
		if err == nil && len(st.rows) == 0 {
			s.vanished()
			return
		}
		pause.Reset(delay)
	}
}
