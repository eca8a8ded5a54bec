package redisbackend

import (
	"context"
	"errors"
	"fmt"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

// Guard stores values in Redis and refuses writers whose lock was lost: each value is kept with the greatest token that
// it was written with, and a write with an older one changes nothing. That protects a value even from a writer that
// was stopped for an hour and does not know yet that its lock is gone.
//
// A value is a hash with the fields "value" and "token", without an expiry, under exactly the key that is given.
type Guard struct{ client redis.UniversalClient }

// NewGuard makes a Guard on a client, which need not be the one that the locks are on.
func NewGuard(client redis.UniversalClient) *Guard { return &Guard{client: client} }

// Set stores a value under the token of a lock that protects it. It answers [locker.ErrStaleToken], and stores nothing,
// if a greater token has written before. The same token may write any number of times.
func (g *Guard) Set(ctx context.Context, key string, value []byte, token uint64) error {
	if token == 0 {
		return &locker.Error{Op: "guard", Key: key, Backend: name, Err: errors.New("the token is zero: give that of a held lock")}
	}
	stored, err := guardScript.Run(ctx, g.client, []string{key}, token, value).Int()
	if err != nil {
		return &locker.Error{Op: "guard", Key: key, Backend: name, Err: explain(err)}
	}
	if stored == 0 {
		return fmt.Errorf("%w: %q was written with a greater token than %d", locker.ErrStaleToken, key, token)
	}
	return nil
}

// Get reads a value and the token with which it was written. A key that was never written has neither.
func (g *Guard) Get(ctx context.Context, key string) (value []byte, token uint64, err error) {
	var stored struct {
		Value []byte `redis:"value"`
		Token uint64 `redis:"token"`
	}
	if err := g.client.HMGet(ctx, key, "value", "token").Scan(&stored); err != nil {
		return nil, 0, &locker.Error{Op: "guard", Key: key, Backend: name, Err: explain(err)}
	}
	return stored.Value, stored.Token, nil
}
