package conformance

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/fec20105/locker"
)

func little(ttl time.Duration) time.Duration {
	if ttl >= 100*time.Millisecond && ttl <= locker.MaxTTL { // others are refused or too short for it
		ttl -= 20 * time.Millisecond
	}
	return ttl
}

func notShort(ttl time.Duration) time.Duration {
	if ttl >= locker.MinTTL && ttl < 100*time.Millisecond {
		ttl = time.Minute
	}
	return ttl
}

func overflows(ttl time.Duration) time.Duration {
	if ttl <= locker.MaxTTL && ttl > locker.MaxTTL/2 {
		ttl = time.Second
	}
	return ttl
}

// waits tells apart, in one Locker, the grants that were waited for.
func waits(f *faulty, granted func(asked time.Time, lease locker.Lease) locker.Lease) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		atOnce := req
		atOnce.NoWait = true
		lease, err := f.Locker.Acquire(ctx, atOnce)
		if req.NoWait || !errors.Is(err, locker.ErrHeld) {
			return lease, err
		}
		asked := time.Now()
		if lease, err = f.Locker.Acquire(ctx, req); err == nil {
			lease = granted(asked, lease)
		}
		return lease, err
	}
}

func waiterCountsFromReply(f *faulty) {
	waits(f, func(_ time.Time, lease locker.Lease) locker.Lease {
		lease.Start = time.Now()
		return lease
	})
}

// timerOfTheWait frees what nobody extends when a TTL has passed since the request began to wait.
func timerOfTheWait(f *faulty) {
	var mu sync.Mutex
	timers := make(map[string]*time.Timer)
	waits(f, func(asked time.Time, lease locker.Lease) locker.Lease {
		mu.Lock()
		defer mu.Unlock()
		left := max(locker.MinTTL, time.Until(asked.Add(lease.TTL)))
		timers[lease.ID] = time.AfterFunc(left, func() { _ = f.Locker.Release(context.Background(), lease) })
		return lease
	})
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		mu.Lock()
		if timer := timers[lease.ID]; timer != nil {
			timer.Stop()
		}
		mu.Unlock()
		return f.Locker.Extend(ctx, lease)
	}
}

// waitIsNotWithdrawn says that it has withdrawn a request, which goes on waiting.
func waitIsNotWithdrawn(f *faulty) {
	waiting := new(leases)
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		waiting.put(req.ID, locker.Lease{})
		defer waiting.drop(req.ID)
		return f.Locker.Acquire(ctx, req)
	}
	f.release = func(ctx context.Context, lease locker.Lease) error {
		if _, waits := waiting.get(lease.ID); waits {
			return nil
		}
		return f.Locker.Release(ctx, lease)
	}
}

// inTwoSteps looks who holds the key, and a little later releases or extends whoever does then.
func inTwoSteps(extends bool) func() fault {
	return func() fault {
		newest := new(leases)
		return func(f *faulty) {
			newest.remember(f)
			holder := func(ctx context.Context, lease locker.Lease) (locker.Lease, bool) {
				inspector, _ := locker.As[locker.Inspector](f.Locker)
				if holding, err := inspector.Inspect(ctx, lease.Key); err != nil || holding.ID != lease.ID {
					return lease, false
				}
				sometimes(ctx, 15*time.Millisecond, 20*time.Millisecond)
				return newest.get(lease.Key)
			}
			if !extends {
				f.release = func(ctx context.Context, lease locker.Lease) error {
					if now, ok := holder(ctx, lease); ok {
						lease = now
					}
					return f.Locker.Release(ctx, lease)
				}
				return
			}
			f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
				now, ok := holder(ctx, lease)
				if !ok {
					return f.Locker.Extend(ctx, lease)
				}
				now.TTL = lease.TTL
				fresh, err := f.Locker.Extend(ctx, now)
				fresh.ID, fresh.Token = lease.ID, lease.Token
				return fresh, err
			}
		}
	}
}

// recreate takes a lost lock again under its old token, if it is free.
func recreate(ctx context.Context, f *faulty, lease locker.Lease) (locker.Lease, error) {
	fresh, err := f.Locker.Acquire(ctx, locker.Request{Key: lease.Key, ID: lease.ID, TTL: lease.TTL, NoWait: true})
	if err != nil {
		return lease, locker.ErrLost
	}
	fresh.Token = lease.Token
	return fresh, nil
}

func recreatesNowAndThen(f *faulty) {
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		fresh, err := f.Locker.Extend(ctx, lease)
		if errors.Is(err, locker.ErrLost) && rand.N(5) == 0 {
			return recreate(ctx, f, lease)
		}
		return fresh, err
	}
}

// recreatesAfterRestart takes a server that has forgotten a lease for one that has not heard of it yet.
func recreatesAfterRestart(f *faulty) {
	f.extend = func(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
		fresh, err := f.Locker.Extend(ctx, lease)
		if g, ok := lease.State.(grantOf); errors.Is(err, locker.ErrLost) && ok && g.life != f.Locker.(*connection).server.now() {
			return recreate(ctx, f, lease)
		}
		return fresh, err
	}
}

func resetMeansHeld(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		if errors.Is(err, syscall.ECONNRESET) && req.NoWait {
			err = locker.ErrHeld
		}
		return lease, err
	}
}

// overtakes keeps a queue of those who wait, of which those who ask once know nothing.
func overtakes() fault {
	var mu sync.Mutex
	queues := make(map[string][]string)
	return func(f *faulty) {
		f.opaque = true
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			if req.NoWait {
				return f.Locker.Acquire(ctx, req)
			}
			mu.Lock()
			queues[req.Key] = append(queues[req.Key], req.ID)
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				queues[req.Key] = slices.DeleteFunc(queues[req.Key], func(id string) bool { return id == req.ID })
			}()
			atOnce := req
			atOnce.NoWait = true
			for first := true; ; first = false {
				mu.Lock()
				turn := queues[req.Key][0] == req.ID
				mu.Unlock()
				if turn || first { // the first shows that it waits
					if lease, err := f.Locker.Acquire(ctx, atOnce); !errors.Is(err, locker.ErrHeld) {
						return lease, err
					}
				}
				if !sometimes(ctx, 2*time.Millisecond, 4*time.Millisecond) {
					return locker.Lease{}, &locker.Error{Op: "acquire", Key: req.Key, Err: errors.Join(ctx.Err(), locker.ErrHeld)}
				}
			}
		}
	}
}

// bareErrors does not tell what it was asked.
func bareErrors(f *faulty) {
	bare := func(err error) error {
		if wrapper, ok := errors.AsType[*locker.Error](err); ok {
			return wrapper.Err
		}
		return err
	}
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		return lease, bare(err)
	}
	f.release = func(ctx context.Context, lease locker.Lease) error { return bare(f.Locker.Release(ctx, lease)) }
}

// grantOfAnother does not say whose grant it is.
func grantOfAnother(f *faulty) {
	f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
		lease, err := f.Locker.Acquire(ctx, req)
		lease.Holder = ""
		return lease, err
	}
}

// closeLeavesWaits ends waits at this side only. Their places stay in the queue, and are kept alive when they are granted.
func closeLeavesWaits() fault {
	type answer struct {
		lease locker.Lease
		err   error
	}
	return func(f *faulty) {
		closed, end := context.WithCancel(context.Background())
		f.close = end
		f.acquire = func(call context.Context, req locker.Request) (locker.Lease, error) {
			if req.NoWait || closed.Err() != nil || call.Err() != nil {
				return f.Locker.Acquire(call, req)
			}
			place := f.Locker.(*connection).server.connect()
			wait, leave := context.WithCancel(context.WithoutCancel(call))
			answers := make(chan answer, 1)
			go func() {
				lease, err := place.Acquire(wait, req)
				answers <- answer{lease, err}
				for err == nil && closed.Err() != nil && sometimes(wait, lease.TTL/4, lease.TTL/3) {
					_, err = place.Extend(wait, lease)
				}
			}()
			select {
			case a := <-answers:
				leave()
				return a.lease, a.err
			case <-call.Done():
				leave()
				a := <-answers
				return a.lease, a.err
			case <-closed.Done():
				time.AfterFunc(3*req.TTL, leave) // long enough to be seen
				return locker.Lease{}, locker.ErrClosed
			}
		}
	}
}

// pilesUp keeps a goroutine, or a connection, of each request that was refused, until it is closed.
func pilesUp(connections bool) fault {
	return func(f *faulty) {
		end := make(chan struct{})
		var kept sync.WaitGroup
		f.close = sync.OnceFunc(func() {
			close(end)
			kept.Wait()
		})
		f.acquire = func(ctx context.Context, req locker.Request) (locker.Lease, error) {
			lease, err := f.Locker.Acquire(ctx, req)
			if err == nil {
				return lease, nil
			}
			var conn net.Conn
			if connections {
				here, there := net.Pipe()
				if conn, _ = f.net.connect(here); conn == nil {
					return lease, err
				}
				kept.Go(func() {
					_, _ = conn.Read(make([]byte, 1))
					_ = there.Close()
				})
			}
			kept.Go(func() {
				<-end
				if conn != nil {
					_ = conn.Close()
				}
			})
			return lease, err
		}
	}
}
