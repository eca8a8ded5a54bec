package conformance

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

// spy stands between a Client and its Locker. It counts what the Client asks, and keeps the leases, which a Client
// shows to nobody.
type spy struct {
	locker.Locker
	tries, renewals atomic.Int64 // Extend calls: begun, and answered with success
	releases        atomic.Int64 // Release calls begun

	mu     sync.Mutex
	leases map[string]locker.Lease // the latest of each key
}

// spied makes a Client like t.client does, and listens to what it asks.
func (t *trial) spied(opts ...locker.Option) (*locker.Client, *spy, *Network) {
	l, net := t.open()
	s := &spy{Locker: l, leases: make(map[string]locker.Lease)}
	return t.clientOf(s, opts...), s, net
}

// Unwrap is the Locker that is spied on.
func (s *spy) Unwrap() locker.Locker { return s.Locker }

func (s *spy) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	lease, err := s.Locker.Acquire(ctx, req)
	if err == nil {
		s.mu.Lock()
		s.leases[req.Key] = lease
		s.mu.Unlock()
	}
	return lease, err
}

func (s *spy) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	s.tries.Add(1)
	lease, err := s.Locker.Extend(ctx, lease)
	if err == nil {
		s.renewals.Add(1)
	}
	return lease, err
}

func (s *spy) Release(ctx context.Context, lease locker.Lease) error {
	s.releases.Add(1)
	return s.Locker.Release(ctx, lease)
}

// lease is what the server granted for key.
func (s *spy) lease(key string) locker.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leases[key]
}

// watched is a held lock, and the moment at which the work was told of its end.
type watched struct {
	*locker.Lock
	ended chan struct{} // closed after at was set
	at    time.Time
}

// watch times the end of ctx, which is the lock's or the work's.
func watch(ctx context.Context, lock *locker.Lock) *watched {
	w := &watched{Lock: lock, ended: make(chan struct{})}
	context.AfterFunc(ctx, func() {
		w.at = time.Now()
		close(w.ended)
	})
	return w
}

// hold acquires a key, which must be free, through a Client.
func (t *trial) hold(client *locker.Client, key string, opts ...locker.Option) *watched {
	lock, err := client.Acquire(t.ctx, key, append(opts, locker.WithNoWait())...)
	if err != nil {
		t.Fatalf("a Client acquires %q, which is free: %v", key, err)
	}
	return watch(lock.Context(), lock)
}

// endsBy waits for the end of the lock, which must come by then, and returns its reason. On a machine
// that is so busy that the row itself wakes up late, the holder has the slack once more.
func (t *trial) endsBy(lock *watched, then time.Time) locker.Reason {
	if !t.wait(lock.ended, time.Until(then)) {
		late := time.Since(then)
		if late < t.slack/10 || !t.wait(lock.ended, t.slack) {
			t.Fatalf("the context of the holder of %q has not ended by the limit; Err says: %v", lock.Key(), lock.Err())
		}
	}
	return t.loss(lock.Err()).Reason
}

// loss is the loss that err tells of.
func (t *trial) loss(err error) *locker.LostError {
	lost, ok := errors.AsType[*locker.LostError](err)
	if !ok {
		t.Fatalf("the holder was told %v, want a *LostError", err)
	}
	return lost
}

// takeOver asks for the key of a lock until the observer is granted it: now and then as long as the lock is trusted
// for long, and every few milliseconds round its deadline, for it is the moment of the grant that counts. It fails the
// row if there is no grant by then.
func (t *trial) takeOver(observer locker.Locker, lock *watched, then time.Time, change ...func(*locker.Request)) (lease locker.Lease, granted time.Time) {
	for {
		asked := time.Now()
		lease, err := observer.Acquire(t.ctx, t.request(lock.Key(), append(change, noWait)...))
		granted := time.Now()
		switch {
		case err == nil:
			return lease, granted
		case !errors.Is(err, locker.ErrHeld):
			t.Fatalf("asking once for %q: %v", lock.Key(), err)
		case asked.After(then):
			t.Fatalf("%q is still held %v after the limit", lock.Key(), asked.Sub(then))
		}
		t.pass(max(t.TTL/200, min(t.TTL/10, time.Until(lock.Deadline())/2)))
	}
}

// trusted fails the row if somebody else was granted the key of a lock before its holder's deadline.
func (t *trial) trusted(lock *watched, granted time.Time) {
	if early := lock.Deadline().Sub(granted); early > 0 {
		t.Errorf("%q was granted to another %v before the deadline of its holder", lock.Key(), early)
	}
}

// knew fails the row if somebody else was granted the key of a lock whose holder could not know that it is lost: its
// deadline must have passed, and Err must say so. Call it at once after the grant.
func (t *trial) knew(lock *watched, granted time.Time) {
	err := lock.Err()
	t.trusted(lock, granted)
	if err == nil {
		t.Errorf("%q was granted to another while Err of its holder is nil", lock.Key())
	}
}

// expired waits for the holder's context after a loss that only the clock can have told of. Err was not asked
// before: that would end the context too. It takes a timer and a goroutine; how much later than the deadline it was
// is the answer.
func (t *trial) expired(lock *watched, granted time.Time) (late time.Duration) {
	t.trusted(lock, granted)
	if reason := t.endsBy(lock, granted.Add(t.TTL)); reason != locker.ReasonExpired {
		t.Errorf("the holder of %q was told %v, want %v", lock.Key(), reason, locker.ReasonExpired)
	}
	return lock.at.Sub(lock.Deadline())
}

// inTime fails the row if the contexts of lost locks ended too late. A quarter of them must have been in time, for
// a busy machine now and then lets many timers wait together; a Client that only looks at the clock now and then
// has less.
func (t *trial) inTime(late []time.Duration) {
	slices.Sort(late)
	if quartile := late[len(late)/4]; quartile > t.slack {
		t.Errorf("three quarters of the contexts ended %v or more after the deadline, want %v at most", quartile, t.slack)
	}
}
