package locker

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// DoError is the answer of [Client.Do] when the lock was lost, also if the work succeeded. It matches ErrLost, and
// whatever Work and Compensation match.
type DoError struct {
	Lost         *LostError
	Work         error // what the work returned
	Compensation error // what the compensation returned; nil also if there is none
}

// Error tells all three.
func (e *DoError) Error() string {
	var b strings.Builder
	b.WriteString(e.Lost.Error())
	if e.Work != nil {
		fmt.Fprintf(&b, "; the work: %v", e.Work)
	}
	if e.Compensation != nil {
		fmt.Fprintf(&b, "; the compensation: %v", e.Compensation)
	}
	return b.String()
}

// Unwrap returns the errors that are not nil.
func (e *DoError) Unwrap() []error {
	errs := []error{e.Lost}
	for _, err := range []error{e.Work, e.Compensation} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Do takes the lock, runs work while it is held under a heartbeat, and releases it. The ctx that work gets ends, with the
// cause, the moment the lock can no longer be trusted, and with Do's ctx. Do returns after the work has returned,
// however it ended:
//
//   - The lock could not be taken: the error of [Client.Acquire]; the work has not run.
//   - The lock was trusted until the work returned, and was released: the work's error.
//   - The same, but no answer says how the release ended: the work's error, and a line in the log. A lost answer is not a lost lock, and
//     starts no compensation.
//   - The lock was lost (renewals failed until the deadline, or the server says that it was not held any more): a
//     *DoError that matches ErrLost, also if the work returned nil. The compensation has run once.
//
// That ctx was cancelled is no loss. If the work panics, the lock is released and the panic goes on.
func (c *Client) Do(ctx context.Context, key string, work func(ctx context.Context, lock *Lock) error, opts ...DoOption) (err error) {
	s, err := with(c.defaults, opts)
	if err == nil && work == nil {
		err = errors.New("the work is nil")
	}
	if err != nil {
		return &Error{Op: "do", Key: key, Err: err}
	}
	lock, err := c.acquire(ctx, key, s)
	if err != nil {
		return err
	}
	workCtx, cancel := lock.Bind(ctx)
	defer func() { // also when the work panics
		cancel()
		lost := lock.finish(ctx)
		if lost == nil {
			return
		}
		failed := &DoError{Lost: lost, Work: err}
		if s.compensate != nil {
			failed.Compensation = compensate(ctx, s, lost)
		}
		err = failed
	}()
	return work(workCtx, lock)
}

// finish releases the lock after the work and tells whether it was lost.
func (l *Lock) finish(ctx context.Context) *LostError {
	err := l.Release(ctx)
	if lost, ok := errors.AsType[*LostError](err); ok {
		return lost
	}
	if err != nil {
		l.settings.logger.WarnContext(ctx, "the work is done, but no answer says that its lock was released: it ends with its TTL",
			"key", l.lease.Key, "token", l.lease.Token, "error", err)
	}
	return nil
}

func compensate(ctx context.Context, s *settings, lost *LostError) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), compensationTimeout)
	defer cancel()
	return s.compensate(ctx, lost)
}
