package locker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fec20105/locker/internal/clock"
)

// Lock is one held lock. It is trusted until its deadline, which every renewal moves; it ends when it is lost or released. A
// Lock that is held costs a timer, but no goroutine. It is safe for concurrent use.
type Lock struct {
	client   *Client
	settings *settings
	ctx      context.Context // ends with the lock, and carries why
	cancel   context.CancelCauseFunc

	mu       sync.Mutex
	lease    Lease         // the newest; Key, ID, Holder and Token never change once it is granted
	from     clock.Reading // read just before the call that lease.Start belongs to
	granted  clock.Reading // the same for the first lease
	deadline time.Time
	end      error // nil while the lock is trusted, then *LostError or ErrReleased
	turn     bool  // whether the key's turn in this process is ours to pass on

	timer    *time.Timer   // runs step when there is something to decide
	nextTry  time.Time     // when to renew
	asked    bool          // the heartbeat has asked since the last success
	tries    int           // renewals under way
	idle     chan struct{} // made when somebody waits for tries to be zero, closed then
	failures int           // answered with an error since the last success
	failing  bool          // a renewal has failed or is not answered in time
	warned   bool          // in this lapse

	cleanAt  time.Time // when an ended lock is still to be released at the server
	cleaning bool
	released chan struct{} // closed when Release knows its answer
	answer   error         // of Release
}

var errSuspended = errors.New("the machine was suspended while the server was asked")

// newLock makes a Lock that is not granted yet.
func newLock(ctx context.Context, c *Client, s *settings, req Request, turn bool) *Lock {
	l := &Lock{client: c, settings: s, turn: turn, lease: Lease{Key: req.Key, ID: req.ID, Holder: req.Holder}}
	l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	return l
}

// margin is taken off each lease, for clocks that drift and timers that are late: the Redlock algorithm's figure
// (https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/), 1 % of the TTL and 2 ms.
func margin(ttl time.Duration) time.Duration { return ttl/100 + 2*time.Millisecond }

// grant begins the life of the lock, or says why it cannot begin.
func (l *Lock) grant(lease Lease, before, now clock.Reading) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.end != nil {
		return fmt.Errorf("taken away before the grant arrived: %v", l.end) //nolint:errorlint // ErrLost is no answer to an acquire
	}
	l.lease.Token = lease.Token
	l.accept(lease, before, now)
	l.granted = clock.Reading{Mono: l.lease.Start, Boot: before.Boot + l.lease.Start.Sub(before.Mono)}
	if left := l.left(now); left <= 0 {
		return fmt.Errorf("granted too late: the answer took %v, and of a TTL of %v nothing was left to trust",
			now.Since(lease.Start, before).Round(time.Millisecond), lease.TTL)
	}
	if err := l.client.keep(l); err != nil {
		return err
	}
	if l.turn {
		l.client.queue.hold(l)
	}
	l.timer = time.AfterFunc(l.untilNext(now), l.step)
	return nil
}

// accept takes over what a renewal may change: Start, TTL and the backend's State.
func (l *Lock) accept(lease Lease, before, now clock.Reading) {
	if lease.Start.After(now.Mono) {
		lease.Start = before.Mono // a backend that errs must not gain trust by it
	}
	l.lease.Start, l.lease.TTL, l.lease.State = lease.Start, lease.TTL, lease.State
	if l.from.Mono.IsZero() || !lease.Start.Before(before.Mono) {
		l.from = before // else the answer is to a request that was under way already: an earlier reading is the safe one
	}
	l.deadline = lease.Start.Add(lease.TTL - margin(lease.TTL))
	l.nextTry = lease.Start.Add(l.every())
	l.failures, l.asked, l.failing, l.warned = 0, false, false, false
}

// every is the heartbeat's period.
func (l *Lock) every() time.Duration {
	if h := l.settings.heartbeat; h > 0 {
		return h
	}
	return l.lease.TTL / 3
}

// left tells how long the lock can still be trusted.
func (l *Lock) left(now clock.Reading) time.Duration {
	return l.lease.TTL - margin(l.lease.TTL) - now.Since(l.lease.Start, l.from)
}

// Key returns the lock's name.
func (l *Lock) Key() string { return l.lease.Key }

// Token returns the fencing token: greater than that of every earlier grant of the key, and the same for the whole life of
// the Lock. Send it along with every write, to a resource that refuses tokens older than the newest it has seen.
func (l *Lock) Token() uint64 { return l.lease.Token }

// Deadline returns the moment until which the lock can be trusted if no further renewal succeeds. After the end of the
// lock it keeps its last value.
func (l *Lock) Deadline() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.check(l.client.clock.Now()) // a suspend has brought it nearer
	return l.deadline
}

// Err returns nil while the lock can be trusted, a *LostError after a loss, and ErrReleased after a Release. It compares
// clocks at each call: in a process that was stopped, or on a machine that was suspended, the very first
// Err after waking up tells the truth. Call it before each write that must not come late.
func (l *Lock) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.check(l.client.clock.Now())
}

// Done returns a channel that is closed when the lock ends. It takes a timer: after a suspend of the machine it comes up
// to a third of the TTL after waking, while Err tells at once.
func (l *Lock) Done() <-chan struct{} { return l.ctx.Done() }

// Context returns a context that ends with the lock; its cause ([context.Cause]) is a *LostError or ErrReleased. It has the
// values of Acquire's ctx, but not its cancel or deadline. Its Err is as honest as the Lock's.
func (l *Lock) Context() context.Context { return lockContext{l.ctx, l} }

type lockContext struct {
	context.Context
	lock *Lock
}

func (c lockContext) Err() error {
	_ = c.lock.Err() // ends the context if the time is over
	return c.Context.Err()
}

// Bind returns a copy of ctx that ends with ctx or with the lock, whichever is first; its cause tells which.
func (l *Lock) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	bound, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(l.ctx, func() { cancel(context.Cause(l.ctx)) })
	return boundContext{bound, l, cancel}, func() {
		stop()
		cancel(nil)
	}
}

type boundContext struct {
	context.Context
	lock   *Lock
	cancel context.CancelCauseFunc
}

func (c boundContext) Err() error {
	if err := c.lock.Err(); err != nil {
		c.cancel(err) // the function that Bind left with the lock may not have run yet
	}
	return c.Context.Err()
}

// check ends the lock if its time is over, and returns how it ended.
func (l *Lock) check(now clock.Reading) error {
	if l.end == nil && now.Parted(l.from) {
		if sooner := now.Mono.Add(l.left(now)); sooner.Before(l.deadline) {
			l.deadline = sooner
		}
	}
	switch {
	case l.end != nil:
	case l.left(now) <= 0:
		l.lose(ReasonExpired, now)
	case l.settings.maxHold > 0 && l.held(now) >= l.settings.maxHold:
		l.lose(ReasonMaxHold, now)
	}
	return l.end
}

// held tells for how long the lock has been held.
func (l *Lock) held(now clock.Reading) time.Duration { return now.Since(l.granted.Mono, l.granted) }

// lose ends a trusted lock. Where the server still counts it as held it is not given up before the server's own time is over:
// the work has just been told, and may need the moment.
func (l *Lock) lose(reason Reason, now clock.Reading) {
	l.end = &LostError{Key: l.lease.Key, Token: l.lease.Token, Reason: reason}
	l.cancel(l.end)
	l.passTurn()
	l.cleanAt = now.Mono
	if reason == ReasonExpired || reason == ReasonMaxHold {
		l.cleanAt = l.lease.Start.Add(l.lease.TTL)
	}
	if l.timer != nil {
		l.timer.Reset(l.cleanAt.Sub(now.Mono))
	}
}

func (l *Lock) passTurn() {
	if l.turn {
		l.turn = false
		l.client.queue.pass(l.lease.Key)
	}
}

// lostByBackend is the Request's Lost. It may come before the grant.
func (l *Lock) lostByBackend(reason Reason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.end != nil:
	case l.timer == nil:
		l.end = &LostError{Key: l.lease.Key, Reason: reason}
	default:
		l.lose(reason, l.client.clock.Now())
	}
}

// Extend renews the lock now, in addition to the heartbeat. It answers nil, an error that matches ErrLost if the lock has
// ended, or another error, which neither ends nor extends the lock: the deadline does.
func (l *Lock) Extend(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return &Error{Op: "extend", Key: l.lease.Key, Err: err}
	}
	ctx, cancel := l.Bind(ctx)
	defer cancel()
	var err error
	for range 2 { // once more after a suspend
		l.mu.Lock()
		if end := l.check(l.client.clock.Now()); end != nil {
			l.mu.Unlock()
			return l.ended(end)
		}
		l.tries++
		l.mu.Unlock()
		if err = l.renew(ctx); !errors.Is(err, errSuspended) {
			break
		}
	}
	if err == nil {
		return nil
	}
	if end := l.Err(); end != nil {
		return l.ended(end)
	}
	if _, wrapped := errors.AsType[*Error](err); !wrapped {
		err = &Error{Op: "extend", Key: l.lease.Key, Backend: l.client.backend(), Err: err}
	}
	return err
}

// ended makes ErrReleased match ErrLost, for those who ask for more than how the lock ended.
func (l *Lock) ended(end error) error {
	if errors.Is(end, ErrReleased) {
		return fmt.Errorf("%w: %w", end, ErrLost)
	}
	return end
}

// heldError tells others of this process that the lock is held.
func (l *Lock) heldError() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	left := l.lease.TTL - l.client.clock.Now().Since(l.lease.Start, l.from)
	return &HeldError{Key: l.lease.Key, Holder: l.lease.Holder, Remaining: max(left, 0)}
}

// Release gives the lock up. It uses ctx for its values only, so that a lock is released also when the work was cancelled, and is
// bounded by WithReleaseTimeout. It answers nil when the server has freed the lock; an error that matches ErrLost if the lock
// was lost before; any other error if no answer came: then the lock ends with its TTL, and is not renewed any more.
// A second call answers like the first. Once Release has returned nil no request names this lock again, except one
// that ends a minimum hold.
func (l *Lock) Release(ctx context.Context) error {
	l.mu.Lock()
	now := l.client.clock.Now()
	end := l.check(now)
	switch {
	case end == nil:
		l.end = ErrReleased
		l.cancel(ErrReleased) // ends renewals too
		l.timer.Stop()
		l.released = make(chan struct{})
		l.mu.Unlock()
		l.answer = l.giveUp(ctx)
		close(l.released)
		return l.answer
	case l.released != nil:
		l.mu.Unlock()
		<-l.released
		return l.answer
	default: // lost: the clean-up need not wait any longer
		l.cleanAt = now.Mono
		l.timer.Reset(0)
		l.mu.Unlock()
		return end
	}
}

func (l *Lock) giveUp(ctx context.Context) error {
	bounded := within(context.WithoutCancel(ctx), nil, l.settings.releaseTimeout)
	defer bounded.end()
	if err := l.quiet(bounded); err != nil {
		l.client.work.Go(l.cleanUp)
		return &Error{Op: "release", Key: l.lease.Key, Backend: l.client.backend(), Err: err}
	}
	if l.keepMinHold() {
		return nil
	}
	// The next in this process asks meanwhile, so that a backend can send both requests together. Should the second
	// overtake the first, it waits at the server.
	l.mu.Lock()
	l.passTurn()
	l.mu.Unlock()
	err := l.client.release(bounded, l.lease, l.settings)
	l.gone()
	return l.releaseAnswer(err)
}

func (l *Lock) releaseAnswer(err error) error {
	if errors.Is(err, ErrLost) {
		return &LostError{Key: l.lease.Key, Token: l.lease.Token, Reason: ReasonTaken}
	}
	return err
}

// keepMinHold leaves the lock at the server if it has not been held for long enough, and plans its release. Without this
// process the server keeps it that long too: a minimum hold is at most the TTL, and no lease begins before the first.
func (l *Lock) keepMinHold() bool {
	if l.settings.minHold == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.client.clock.Now()
	rest := l.settings.minHold - l.held(now)
	if rest <= 0 {
		return false
	}
	l.passTurn()
	l.cleanAt = now.Mono.Add(rest)
	l.timer.Reset(rest)
	if l.client.ctx.Err() != nil { // Close looked at this lock before there was anything to plan
		l.leave()
	}
	return true
}

// leave lets the server end a lock that is kept for its minimum hold.
func (l *Lock) leave() {
	l.cleaning = true
	l.timer.Stop()
	l.client.work.Go(l.gone)
}

// quiet waits for renewals under way; the end of the lock's context has ended them.
func (l *Lock) quiet(ctx context.Context) error {
	l.mu.Lock()
	if l.tries == 0 {
		l.mu.Unlock()
		return nil
	}
	if l.idle == nil {
		l.idle = make(chan struct{})
	}
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("a renewal did not end with its context: %w", ctx.Err())
	}
}

// cleanUp releases a lock at the server that has ended for its holder already.
func (l *Lock) cleanUp() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), l.settings.releaseTimeout)
	defer cancel()
	err := l.quiet(ctx)
	if err == nil {
		err = l.client.release(ctx, l.lease, l.settings)
	}
	if err != nil && !errors.Is(err, ErrLost) {
		l.settings.logger.DebugContext(ctx, "clean-up of an ended lock failed", "key", l.lease.Key, "token", l.lease.Token, "error", err)
	}
	l.gone()
}

// gone ends the lock's life in the Client.
func (l *Lock) gone() {
	l.mu.Lock()
	l.passTurn()
	l.mu.Unlock()
	l.client.drop(l)
}

// close ends the lock with the Client.
func (l *Lock) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.client.clock.Now()
	switch {
	case l.check(now) == nil:
		l.lose(ReasonClosed, now)
	case l.cleanAt.IsZero() || l.cleaning: // a Release or clean-up is under way
	case errors.Is(l.end, ErrReleased): // kept for its minimum hold
		l.leave()
	default:
		l.cleanAt = now.Mono
		l.timer.Reset(0)
	}
}
