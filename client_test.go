package locker_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

func TestHeartbeatHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := membackend.NewStore()
		c, err := locker.New(store.Locker(), locker.WithTTL(3*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		err = c.Do(t.Context(), "k", func(ctx context.Context, l *locker.Lock) error {
			time.Sleep(time.Minute)
			if ctx.Err() != nil || l.Err() != nil {
				t.Error("lost", l.Err())
			}
			store.Expire("k")
			synctest.Wait()
			if ctx.Err() == nil {
				t.Error("not lost")
			}
			return nil
		})
		if !errors.Is(err, locker.ErrLost) {
			t.Fatal(err)
		}
		l, err := c.Acquire(t.Context(), "k", locker.WithoutHeartbeat())
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		<-l.Done()
		if got, want := time.Since(start), 3*time.Second-30*time.Millisecond-2*time.Millisecond; got != want {
			t.Errorf("told after %v want %v", got, want)
		}
	})
}
