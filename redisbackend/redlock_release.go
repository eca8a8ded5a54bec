package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fec20105/locker"
)

// Extend implements [locker.Locker]. When most servers have extended the lock, it is told to those that do not know it:
// they may have been down.
func (r *Redlock) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	h, err := r.holdOf(lease)
	if err == nil && (lease.TTL < locker.MinTTL || lease.TTL > locker.MaxTTL) {
		err = fmt.Errorf("a TTL of %v is not between %v and %v", lease.TTL, locker.MinTTL, locker.MaxTTL)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return locker.Lease{}, r.fail("extend", lease.Key, err)
	}
	rd := r.askAbout(ctx, lease.Key, redlockExtendScript, lease.ID, micros(lease.TTL))
	yes, missing, errs := 0, make(map[*node]int64), []error(nil)
	for {
		c, err := rd.next(ctx)
		if err != nil && yes < r.quorum {
			return locker.Lease{}, r.fail("extend", lease.Key, err)
		}
		if c == nil {
			break
		}
		switch reply := c.reply.(type) {
		case int64:
			if reply == 0 {
				if yes++; yes == r.quorum {
					rd.decided()
				}
			} else {
				missing[c.node] = reply - micros(time.Since(rd.began))
			}
		default:
			errs = append(errs, failed(c))
		}
		if len(missing) > len(r.nodes)-r.quorum {
			r.unlisten(lease.ID)
			return locker.Lease{}, locker.ErrLost
		}
	}
	if yes < r.quorum {
		return locker.Lease{}, r.fail("extend", lease.Key, r.tooFew(ctx, yes+len(missing), errs))
	}
	lease.Start = rd.began
	r.repair(ctx, lease, h, missing)
	return lease, nil
}

// repair tells a lock that was just extended to the servers that did not know it, with their own times at which Extend began.
// It does not wait.
func (r *Redlock) repair(ctx context.Context, lease locker.Lease, h *hold, missing map[*node]int64) {
	if len(missing) == 0 {
		return
	}
	label := fmt.Sprint(h.attempt, " ", lease.Holder)
	r.ask(ctx, func(n *node) *call {
		began, ok := missing[n]
		if !ok {
			return nil
		}
		return &call{
			script: redlockRepairScript, key: stateKey(r.prefix, lease.Key),
			args: []any{lease.ID, began + micros(lease.TTL), r.channel, label, lease.Token, r.marker, r.quarantine},
		}
	})
}

// Release implements [locker.Locker].
func (r *Redlock) Release(ctx context.Context, lease locker.Lease) error {
	r.unlisten(lease.ID)
	if err := ctx.Err(); err != nil {
		return r.fail("release", lease.Key, err)
	}
	args := []any{lease.ID}
	var h *hold
	if lease.Token == 0 && lease.State == nil {
		args = append(args, r.channel)
	} else {
		var err error
		if h, err = r.holdOf(lease); err != nil {
			return r.fail("release", lease.Key, err)
		}
		if h.released.Load() {
			return nil
		}
		if h.waited {
			args = append(args, r.channel, "granted")
		}
	}
	key := stateKey(r.prefix, lease.Key)
	rd := r.ask(ctx, func(*node) *call { return &call{script: releaseScript, key: key, args: args} })
	done, lost, errs := 0, 0, []error(nil)
	for {
		c, err := rd.next(ctx)
		switch {
		case err != nil:
			return r.fail("release", lease.Key, err)
		case c == nil:
			return r.fail("release", lease.Key, r.tooFew(ctx, done+lost, errs))
		case c.err != nil:
			errs = append(errs, failed(c))
		case c.reply == int64(1):
			done++
		default:
			lost++
		}
		switch {
		case done == r.quorum:
			if h != nil {
				h.released.Store(true)
			}
			return nil
		case lost > len(r.nodes)-r.quorum:
			return locker.ErrLost
		}
	}
}

// holdOf refuses leases that this Redlock has not granted.
func (r *Redlock) holdOf(lease locker.Lease) (*hold, error) {
	if h, ok := lease.State.(*hold); ok && h.redlock == r {
		return h, nil
	}
	return nil, errors.New("the lease was granted by another Locker: give it back to that one")
}
