package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/fec20105/locker"
)

// breakChannel is where holders hear of locks that they must give up.
const breakChannel = "locker_break"

// breakGrace is how long a holder has to give up a lock before its session is ended.
const breakGrace = 500 * time.Millisecond

// Session is the server's session that holds a lock. Other locks may live on it.
type Session struct {
	PID     int       // of the server's process, as in pg_stat_activity
	Label   string    // its application_name
	Started time.Time // when it was opened, by the server's clock
	TTL     time.Duration
}

// Inspect implements [locker.Inspector]. PostgreSQL knows nothing of a lock but the session that holds it, so Holder, ID and
// Since are not known; see [Backend.InspectSession] for that session. Remaining is known if the session belongs to the same
// user, or the user may read all of pg_stat_activity.
func (b *Backend) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	if err := b.ready(ctx); err != nil {
		return locker.Holding{}, b.fail("inspect", key, err)
	}
	seen, err := b.look(ctx, key)
	if err == nil && seen.session != nil && seen.holding.Token == 0 {
		err = fmt.Errorf("the lock is held by the server's process %d without a token, as by LockTx: %w", seen.session.PID, errors.ErrUnsupported)
	}
	if err != nil {
		return locker.Holding{}, b.fail("inspect", key, err)
	}
	return seen.holding, nil
}

// InspectSession tells on which of the server's sessions a lock is held; false if it is free.
func (b *Backend) InspectSession(ctx context.Context, key string) (Session, bool, error) {
	if err := b.ready(ctx); err != nil {
		return Session{}, false, b.fail("inspect", key, err)
	}
	seen, err := b.look(ctx, key)
	if err != nil {
		return Session{}, false, b.fail("inspect", key, err)
	}
	if seen.session == nil {
		return Session{}, false, nil
	}
	return *seen.session, true, nil
}

// view is what the server's tables show of a key.
type view struct {
	holding locker.Holding
	session *Session // that holds it
	unsure  bool     // who waits, or which token is the holder's
}

var ttlOf = regexp.MustCompile(`^locker hold (\d+)ms `)

// look reads the server's lock table. Who has the gate does nothing for a moment between two statements that wait, and between a
// grant and the opening of the gate; a lock that is passed on has two tokens for a moment: a second look tells them apart.
func (b *Backend) look(ctx context.Context, key string) (v view, err error) {
	const looks = 10
	pause := time.NewTimer(0)
	defer pause.Stop()
	for look := range looks {
		<-pause.C
		if v, err = b.glance(ctx, key); !v.unsure {
			break
		}
		pause.Reset(time.Duration(look) * time.Millisecond)
	}
	return v, err
}

func (b *Backend) glance(ctx context.Context, key string) (view, error) {
	k := spaceOf(b.opts.Prefix, key)
	halves := func(id int64) string { return fmt.Sprintf("(%d, %d)", uint64(id)>>32, uint32(id)) }
	st, err := b.askControl(ctx, fmt.Sprintf("SELECT l.pid, l.objsubid, l.classid::int8, l.objid::int8, l.granted, coalesce(a.application_name, ''), "+
		"coalesce(extract(epoch FROM a.backend_start), 0), a.state IS NOT DISTINCT FROM 'idle', "+
		"coalesce(extract(epoch FROM clock_timestamp() - a.state_change), -1), %s "+
		"FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory' "+
		"AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND CASE l.objsubid "+
		"WHEN 1 THEN (l.classid::int8, l.objid::int8) IN (%s, %s) ELSE l.classid::int8 BETWEEN %d AND %d END",
		b.tokens.Load().newest(), halves(k.lock), halves(k.gate), uint32(k.mark), uint32(k.mark)+0xff))
	if err != nil {
		return view{}, err
	}
	v := view{holding: locker.Holding{Key: key}}
	waits, gate, behind := make(map[string]bool), "", make(map[string]bool)
	lock := strings.Trim(halves(k.lock), "()")
	for _, row := range st.rows {
		switch {
		case row[1] == "1" && row[2]+", "+row[3] != lock:
			waits[row[0]] = true // has the gate, or wants it
			if row[4] == "t" {
				gate = row[0]
			}
		case row[1] == "1" && row[4] == "f":
			behind[row[0]] = true // the holder
		case row[1] == "1" && row[4] == "t" && !waitsFor(row[5]):
			v.read(row)
		}
	}
	v.holding.Waiters = len(waits)
	v.unsure = gate != "" && !behind[gate]
	if v.session == nil {
		return v, nil
	}
	marks := 0
	for _, row := range st.rows {
		if row[1] == "2" && row[0] == strconv.Itoa(v.session.PID) {
			marks++
			class, _ := strconv.ParseUint(row[2], 10, 32)
			object, _ := strconv.ParseUint(row[3], 10, 32)
			newest, _ := strconv.ParseUint(row[9], 10, 64)
			v.holding.Token = unmarked(int32(uint32(class)), int32(uint32(object)), newest)
		}
	}
	if marks > 1 {
		v.unsure = true
		return v, errors.New("two locks of one session cannot be told apart: ask again when one of them is released")
	}
	return v, nil
}

// waitsFor tells by its label that a session passes a lock on rather than hold it.
func waitsFor(label string) bool { return strings.HasPrefix(label, "locker "+string(waiting)+" ") }

// read takes in the session that holds the lock.
func (v *view) read(row []string) {
	pid, _ := strconv.Atoi(row[0])
	began, _ := strconv.ParseFloat(row[6], 64)
	s := &Session{PID: pid, Label: row[5]}
	if began > 0 {
		s.Started = time.UnixMicro(int64(began * 1e6))
	}
	if m := ttlOf.FindStringSubmatch(row[5]); m != nil {
		ttl, _ := strconv.ParseInt(m[1], 10, 64)
		s.TTL = time.Duration(ttl) * time.Millisecond
	}
	v.session = s
	idle, _ := strconv.ParseFloat(row[8], 64)
	if s.TTL > 0 && idle >= 0 {
		v.holding.Remaining = s.TTL
		if row[7] == "t" {
			v.holding.Remaining = max(s.TTL-time.Duration(idle*float64(time.Second)), time.Millisecond)
		}
	}
}

// Break implements [locker.Breaker]. The holder is asked to give the lock up. If it does not in half a second, its session is ended,
// and with it all locks on it; that needs the same user, or a member of pg_signal_backend.
func (b *Backend) Break(ctx context.Context, held locker.Holding) error {
	if err := b.ready(ctx); err != nil {
		return b.fail("break", held.Key, err)
	}
	id := spaceOf(b.opts.Prefix, held.Key).lock
	asked := time.Time{}
	pause := time.NewTimer(0)
	defer pause.Stop()
	for first := true; ; first = false {
		select {
		case <-pause.C:
		case <-ctx.Done():
			return b.fail("break", held.Key, ctx.Err())
		case <-b.ctx.Done():
			return locker.ErrClosed
		}
		seen, err := b.look(ctx, held.Key)
		if err != nil {
			return b.fail("break", held.Key, err)
		}
		if seen.session == nil || seen.holding.Token != held.Token || held.Token == 0 {
			if first {
				return locker.ErrLost
			}
			return nil
		}
		sql := ""
		if first {
			asked = time.Now()
			sql = fmt.Sprintf("SELECT pg_notify('%s', '%d %d')", breakChannel, id, held.Token)
		} else if time.Since(asked) > breakGrace {
			sql = fmt.Sprintf("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid = %d AND granted AND objsubid = 1 "+
				"AND (classid::int8, objid::int8) = (%d, %d)", seen.session.PID, uint64(id)>>32, uint32(id))
		}
		if sql != "" {
			if _, err := b.askControl(ctx, sql); err != nil {
				return b.fail("break", held.Key, err)
			}
		}
		pause.Reset(2 * time.Millisecond)
	}
}

// brokenBy gives up a lock that an operator has taken away.
func (b *Backend) brokenBy(h *holder) func(payload string) {
	return func(payload string) {
		var id int64
		var token uint64
		if _, err := fmt.Sscan(payload, &id, &token); err != nil {
			return // not one of ours
		}
		b.mu.Lock()
		var lost func(locker.Reason)
		for g := range h.grants {
			if g.state == held && g.space.lock == id && g.token == token {
				if lost = g.req.Lost; lost == nil {
					lost = func(locker.Reason) {}
				}
				g.expired = true // a Release finds it lost
				b.free(g)
				break
			}
		}
		b.mu.Unlock()
		if lost != nil {
			lost(locker.ReasonTaken) // before anybody else can have it
			h.flush()
		}
	}
}
