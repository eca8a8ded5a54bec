package locker_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fec20105/locker"
)

// do runs work under the lock "k" of a new store, and prints how that ended.
func do(work func(ctx context.Context, lock *locker.Lock) error, opts ...locker.DoOption) {
	_, client := newExampleClient()
	defer client.Close()
	if err := client.Do(context.Background(), "k", work, opts...); err != nil {
		fmt.Println(err)
	}
}

func ExampleWithTTL() {
	do(func(_ context.Context, lock *locker.Lock) error {
		left := time.Until(lock.Deadline())
		fmt.Println("others wait for a dead holder at most", left.Round(time.Minute))
		return nil
	}, locker.WithTTL(time.Minute))
	// Output: others wait for a dead holder at most 1m0s
}

// The work may outlive its TTL many times.
func ExampleWithHeartbeat() {
	do(func(ctx context.Context, lock *locker.Lock) error {
		time.Sleep(300 * time.Millisecond)
		fmt.Println(ctx.Err(), lock.Err())
		return nil
	}, locker.WithTTL(100*time.Millisecond), locker.WithHeartbeat(20*time.Millisecond))
	// Output: <nil> <nil>
}

func ExampleWithoutHeartbeat() {
	do(func(ctx context.Context, _ *locker.Lock) error {
		<-ctx.Done()
		return nil
	}, locker.WithTTL(50*time.Millisecond), locker.WithoutHeartbeat())
	// Output: locker: lock "k" (token 1) lost: expired
}

func ExampleWithWait() {
	ctx := context.Background()
	_, client := newExampleClient()
	defer client.Close()
	if _, err := client.Acquire(ctx, "k"); err != nil {
		fmt.Println(err)
	}
	_, err := client.Acquire(ctx, "k", locker.WithWait(20*time.Millisecond))
	fmt.Println(errors.Is(err, context.DeadlineExceeded), errors.Is(err, locker.ErrHeld))
	// Output: true true
}

func ExampleWithNoWait() {
	ctx := context.Background()
	_, client := newExampleClient()
	defer client.Close()
	if _, err := client.Acquire(ctx, "k"); err != nil {
		fmt.Println(err)
	}
	_, err := client.Acquire(ctx, "k", locker.WithNoWait())
	fmt.Println(errors.Is(err, locker.ErrHeld))
	// Output: true
}

func ExampleWithHolder() {
	store, client := newExampleClient(locker.WithHolder("nightly job"))
	defer client.Close()
	if _, err := client.Acquire(context.Background(), "k"); err != nil {
		fmt.Println(err)
	}
	fmt.Println(store.Holdings()[0].Holder)
	// Output: nightly job
}

// Of several schedulers whose clocks differ a little, one runs the job.
func ExampleWithMinHold() {
	ctx := context.Background()
	store, client := newExampleClient(locker.WithMinHold(10*time.Second), locker.WithNoWait())
	defer client.Close()
	for range 2 {
		err := client.Do(ctx, "job at noon", func(context.Context, *locker.Lock) error {
			fmt.Println("the job runs")
			return nil
		})
		fmt.Println(err == nil || errors.Is(err, locker.ErrHeld), len(store.Holdings()))
	}
	// Output:
	// the job runs
	// true 1
	// true 1
}

func ExampleWithMaxHold() {
	do(func(ctx context.Context, _ *locker.Lock) error {
		<-ctx.Done() // work that is stuck
		return nil
	}, locker.WithMaxHold(50*time.Millisecond))
	// Output: locker: lock "k" (token 1) lost: max hold
}

// Without a heartbeat the warning comes in time to decide: to extend, or to stop.
func ExampleWithWarning() {
	do(func(ctx context.Context, _ *locker.Lock) error {
		<-ctx.Done()
		return nil
	}, locker.WithTTL(200*time.Millisecond), locker.WithoutHeartbeat(), locker.WithWarning(100*time.Millisecond, func(lock *locker.Lock) {
		fmt.Println("soon over:", lock.Key())
	}))
	// Output:
	// soon over: k
	// locker: lock "k" (token 1) lost: expired
}

func ExampleWithReleaseTimeout() {
	do(func(context.Context, *locker.Lock) error {
		fmt.Println("a server that hangs holds the program up for a second at most")
		return nil
	}, locker.WithReleaseTimeout(time.Second))
	// Output: a server that hangs holds the program up for a second at most
}

// The compensation runs once, after the work has returned, if the lock was lost.
func ExampleWithCompensation() {
	store, client := newExampleClient()
	defer client.Close()
	err := client.Do(context.Background(), "invoice/42", func(context.Context, *locker.Lock) error {
		fmt.Println("charged")
		store.Expire("invoice/42")
		return nil
	}, locker.WithCompensation(func(_ context.Context, lost *locker.LostError) error {
		fmt.Println("refunded what was charged under token", lost.Token)
		return nil
	}))
	fmt.Println(err)
	// Output:
	// charged
	// refunded what was charged under token 1
	// locker: lock "invoice/42" (token 1) lost: taken
}
