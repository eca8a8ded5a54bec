package redisbackend

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/fec20105/locker"
)

// Inspect implements [locker.Inspector]: it tells what most servers say.
func (r *Redlock) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	votes, err := r.votes(ctx, key)
	if err != nil {
		return locker.Holding{}, r.fail("inspect", key, err)
	}
	return r.holding(key, votes), nil
}

// votes are what the servers say that answer, most of all servers at least.
func (r *Redlock) votes(ctx context.Context, key string) (votes []locker.Holding, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rd := r.askAbout(ctx, key, inspectScript)
	rd.straggle = time.Second // for people: few votes may show another token than all of them
	var errs []error
	for {
		c, err := rd.next(ctx)
		switch {
		case err != nil:
			return nil, err
		case c == nil && len(votes) < r.quorum:
			return nil, r.tooFew(ctx, len(votes), errs)
		case c == nil:
			return votes, nil
		case c.err != nil:
			errs = append(errs, failed(c))
		default:
			votes = append(votes, holding(key, c))
		}
	}
}

// holding is the lock that most of these votes make.
func (r *Redlock) holding(key string, votes []locker.Holding) locker.Holding {
	slices.SortFunc(votes, func(a, b locker.Holding) int { return b.Waiters - a.Waiters })
	found := locker.Holding{Key: key, Waiters: votes[r.quorum-1].Waiters}
	byID := make(map[string][]locker.Holding)
	for _, v := range votes {
		if v.Token != 0 {
			byID[v.ID] = append(byID[v.ID], v)
		}
	}
	for id, own := range byID {
		if len(own) < r.quorum {
			continue
		}
		tokens := make(map[uint64]int)
		for _, v := range own {
			// A token that few servers know has been outvoted, or is not written back yet.
			if tokens[v.Token]++; tokens[v.Token] > tokens[found.Token] || tokens[v.Token] == tokens[found.Token] && v.Token > found.Token {
				found.Token = v.Token
			}
		}
		slices.SortFunc(own, func(a, b locker.Holding) int { return int(b.Remaining - a.Remaining) })
		found.ID, found.Remaining = id, own[r.quorum-1].Remaining
		attempt, label := labelOf(own[0].Holder)
		found.Holder, found.Since = label, time.UnixMicro(attempt)
	}
	return found
}

// Break implements [locker.Breaker]. The holder is told at once if its links are alive.
func (r *Redlock) Break(ctx context.Context, held locker.Holding) error {
	votes, err := r.votes(ctx, held.Key)
	if err != nil {
		return r.fail("break", held.Key, err)
	}
	// Few servers may know the token: those that could not accept it voted with a greater one.
	id, byID := "", make(map[string]int)
	for _, v := range votes {
		if v.Token != 0 && v.Token == held.Token {
			if byID[v.ID]++; byID[v.ID] > byID[id] {
				id = v.ID
			}
		}
	}
	if id == "" {
		return locker.ErrLost
	}
	rd := r.askAbout(ctx, held.Key, breakScript, id, "id")
	done, free, errs := 0, 0, []error(nil)
	for {
		c, err := rd.next(ctx)
		switch {
		case err != nil:
			return r.fail("break", held.Key, err)
		case c == nil && done > 0 && done+free >= r.quorum:
			return nil
		case c == nil && free >= r.quorum:
			return locker.ErrLost
		case c == nil:
			return r.fail("break", held.Key, r.tooFew(ctx, done+free, errs))
		case c.err != nil:
			errs = append(errs, failed(c))
		case c.reply == int64(1):
			done++
		default:
			free++
		}
	}
}

// Forget has the servers drop what they keep of a lock that nobody holds or waits for, like [Backend.Forget]. A server that cannot
// be reached forgets it within two days. Do not call it for keys that may be used again while a request is on its way for longer than
// 15 seconds: it could get an old token.
func (r *Redlock) Forget(ctx context.Context, key string) error {
	votes, err := r.votes(ctx, key)
	if err != nil {
		return r.fail("forget", key, err)
	}
	if h := r.holding(key, votes); h.Token != 0 || h.Waiters > 0 {
		return &locker.HeldError{Key: key}
	}
	rd := r.askAbout(ctx, key, forgetScript)
	done, errs := 0, []error(nil)
	for {
		c, err := rd.next(ctx)
		switch {
		case err != nil:
			return r.fail("forget", key, err)
		case c == nil && done >= r.quorum:
			return nil
		case c == nil:
			return r.fail("forget", key, r.tooFew(ctx, done, errs))
		case c.err != nil:
			errs = append(errs, failed(c))
		default:
			done++ // or somebody has got its vote since
		}
	}
}

// List implements [locker.Lister]. It looks at all keys of each server, in steps that do not hold the server up.
func (r *Redlock) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		select {
		case <-r.closed:
			yield(locker.Holding{}, locker.ErrClosed)
			return
		default:
		}
		var errs []error
		seen := make(map[string]bool)
		for _, n := range r.nodes {
			more, err := r.list(ctx, n, seen, yield)
			if !more {
				return
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
		if len(errs) > len(r.nodes)-r.quorum { // a lock stands on one of the others at least
			yield(locker.Holding{}, r.fail("list", "", r.tooFew(ctx, len(r.nodes)-len(errs), errs)))
		}
	}
}

// list yields the locks that one server knows and that were not seen yet.
func (r *Redlock) list(ctx context.Context, n *node, seen map[string]bool, yield func(locker.Holding, error) bool) (more bool, err error) {
	pattern := escapePattern.Replace(r.prefix) + "{*}"
	for cursor := uint64(0); ; {
		var found []string
		page, cancel := context.WithTimeout(ctx, sendBy)
		found, cursor, err = n.client.Scan(page, cursor, pattern, listPage).Result()
		cancel()
		if err != nil {
			return true, fmt.Errorf("%s: %w", n.addr, err)
		}
		for _, state := range found {
			key, ok := nameOf(r.prefix, state)
			if !ok || seen[key] {
				continue
			}
			seen[key] = true
			h, err := r.Inspect(ctx, key)
			if isForeign(err) {
				continue
			}
			if err != nil {
				return yield(locker.Holding{}, err) && false, nil
			}
			if h.Token != 0 && !yield(h, nil) {
				return false, nil
			}
		}
		if cursor == 0 {
			return true, nil
		}
	}
}
