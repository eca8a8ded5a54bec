// Command longjob shows a job that takes longer than its lock's time to live, what a second client sees meanwhile, and
// what the job sees when the lock is taken away from it. Without an argument it needs no server; otherwise the argument is the
// URL of one: redis://127.0.0.1:6379.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/fec20105/locker"
	_ "github.com/fec20105/locker/membackend"
	_ "github.com/fec20105/locker/redisbackend"
)

const ttl = time.Second

func main() {
	url := "mem://example"
	if len(os.Args) > 1 {
		url = os.Args[1]
	}
	if err := run(context.Background(), url, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, url string, out io.Writer) (err error) {
	begin := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(out, "%4.1fs  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}
	first, err := locker.Open(ctx, url, locker.WithTTL(ttl), locker.WithHolder("the first"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, first.Close()) }()
	second, err := locker.Open(ctx, url, locker.WithTTL(ttl), locker.WithHolder("the second"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, second.Close()) }()

	work := func(ctx context.Context, lock *locker.Lock) error {
		say("first:    holds the lock with token %d; its TTL is %v, the job takes three", lock.Token(), ttl)
		wait(ctx, 3*ttl)
		_, held := second.Acquire(ctx, "job", locker.WithNoWait())
		say("second:   %v", held)

		say("operator: takes the lock away")
		if err := takeAway(ctx, second); err != nil {
			return err
		}
		wait(ctx, ttl)
		say("first:    stops working: %v", context.Cause(ctx))
		return nil
	}
	undo := func(_ context.Context, lost *locker.LostError) error {
		say("first:    undoes what it did under token %d", lost.Token)
		return nil
	}
	if err := first.Do(ctx, "job", work, locker.WithCompensation(undo)); !errors.Is(err, locker.ErrLost) {
		return fmt.Errorf("the job should have been told that its lock was lost, but: %w", err)
	}
	lock, err := second.Acquire(ctx, "job")
	if err != nil {
		return err
	}
	say("second:   holds the lock with token %d, and every guard refuses what the first might still write", lock.Token())
	return lock.Release(ctx)
}

// takeAway is what an operator does to a lock whose holder is stuck.
func takeAway(ctx context.Context, c *locker.Client) error {
	holding, err := c.Inspect(ctx, "job")
	if err != nil {
		return err
	}
	breaker, ok := locker.As[locker.Breaker](c.Locker())
	if !ok {
		return errors.ErrUnsupported
	}
	return breaker.Break(ctx, holding)
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
