package redisbackend

import (
	"context"
	"iter"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

// Inspect implements [locker.Inspector].
func (b *Backend) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	c := b.inspection(key)
	if err := b.calls.do(ctx, c); err != nil {
		return locker.Holding{}, b.fail("inspect", key, err)
	}
	return holding(key, c), nil
}

func (b *Backend) inspection(key string) *call {
	return &call{script: inspectScript, key: stateKey(b.prefix, key)}
}

func holding(key string, c *call) locker.Holding {
	reply := c.reply.([]any)
	h := locker.Holding{
		Key:       key,
		Token:     uint64(reply[0].(int64)),
		Remaining: fromMicros(reply[1].(int64)),
		ID:        reply[2].(string),
		Holder:    reply[3].(string),
		Waiters:   int(reply[4].(int64)),
	}
	if h.Token != 0 {
		h.Since = time.UnixMicro(int64(h.Token)) // a token is the time of the grant, unless the clock was set back
	}
	return h
}

// lostOf finds out who of some requests, by ID, does not hold its key.
func (b *Backend) lostOf(ctx context.Context, keys map[string]string) (ids []string) {
	calls := make(map[string]*call)
	for id, key := range keys {
		c := b.inspection(key)
		if b.calls.begin(ctx, c) == nil {
			calls[id] = c
		}
	}
	for id, c := range calls {
		if b.calls.finish(ctx, c) == nil && holding(keys[id], c).ID != id {
			ids = append(ids, id)
		}
	}
	return ids
}

// Break implements [locker.Breaker]. The holder is told at once if its link is alive.
func (b *Backend) Break(ctx context.Context, held locker.Holding) error {
	c := &call{script: breakScript, key: stateKey(b.prefix, held.Key), args: []any{held.Token}}
	// By a worker, which does not repeat it after a moment: the second of two would find that the grant is gone.
	if err := b.calls.queued(ctx, c); err != nil {
		return b.fail("break", held.Key, err)
	}
	if c.reply != int64(1) {
		return locker.ErrLost
	}
	return nil
}

// Forget has the server drop what it keeps of a lock that nobody holds or waits for, its last token above all: after 15 seconds
// instead of one to two days. It is for programs that use each key once. The next token is greater than the last all the
// same as long as the server's clock is not set back. The error matches [locker.ErrHeld] if the lock is in use.
func (b *Backend) Forget(ctx context.Context, key string) error {
	c := &call{script: forgetScript, key: stateKey(b.prefix, key)}
	if err := b.calls.do(ctx, c); err != nil {
		return b.fail("forget", key, err)
	}
	if c.reply != int64(1) {
		return &locker.HeldError{Key: key}
	}
	return nil
}

// listPage is about how many keys the server looks at in one step of a List.
const listPage = 500

// List implements [locker.Lister]. It looks at all keys of the database, in steps that do not hold up the server. In a
// cluster all primaries are asked.
func (b *Backend) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		select {
		case <-b.closed: // a client that is not ours would go on answering
			yield(locker.Holding{}, locker.ErrClosed)
			return
		default:
		}
		servers, err := b.servers(ctx)
		for i := 0; err == nil && i < len(servers); i++ {
			var more bool
			if more, err = b.list(ctx, servers[i], yield); !more {
				return
			}
		}
		if err != nil {
			yield(locker.Holding{}, b.fail("list", "", err))
		}
	}
}

// list yields what is held on one server.
func (b *Backend) list(ctx context.Context, server redis.Cmdable, yield func(locker.Holding, error) bool) (more bool, err error) {
	pattern := escapePattern.Replace(b.prefix) + "{*}"
	for cursor := uint64(0); ; {
		var found []string
		if found, cursor, err = server.Scan(ctx, cursor, pattern, listPage).Result(); err != nil {
			return true, err
		}
		var names []string
		var calls []*call
		for _, state := range found {
			name, ok := nameOf(b.prefix, state)
			if !ok {
				continue
			}
			c := b.inspection(name)
			if err := b.calls.begin(ctx, c); err != nil {
				return true, err
			}
			names, calls = append(names, name), append(calls, c)
		}
		for i, c := range calls {
			if err := b.calls.finish(ctx, c); isForeign(err) {
				continue
			} else if err != nil {
				return true, err
			}
			if h := holding(names[i], c); h.Token != 0 && !yield(h, nil) {
				return false, nil
			}
		}
		if cursor == 0 {
			return true, nil
		}
	}
}

// isForeign reports whether a script found something else than the state of a lock; see prelude.lua.
func isForeign(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "WRONGTYPE") || strings.Contains(err.Error(), "is in use for something that is not a lock"))
}

// escapePattern keeps the server from reading a prefix as a pattern.
var escapePattern = strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`, "]", `\]`)
