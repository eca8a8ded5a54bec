package redisbackend_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/redisbackend"
)

// A program that has a Redis client already gives it to New. Programs that do not can say
// locker.Open(ctx, "redis://host:6379") instead.
func ExampleNew() {
	ctx := context.Background()
	redisClient := redis.NewClient(&redis.Options{Addr: exampleAddr()})
	defer redisClient.Close()

	backend, err := redisbackend.New(ctx, redisClient, redisbackend.Options{Prefix: "myapp:locks:"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer backend.Close()
	client, err := locker.New(backend)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	err = client.Do(ctx, "invoice/42", func(ctx context.Context, lock *locker.Lock) error {
		fmt.Println("holding", lock.Key())
		return ctx.Err()
	})
	fmt.Println("error:", err)
	// Output:
	// holding invoice/42
	// error: <nil>
}

// The primary that Sentinels watch, without a URL. Both replicas must confirm each grant, so that a failover is told before
// another is granted the lock. A URL for the same is redis+sentinel://sentinel1,sentinel2,sentinel3/mymaster?replicas=2.
func ExampleNew_sentinel() {
	ctx := context.Background()
	redisClient := redis.NewFailoverClient(&redis.FailoverOptions{
		MasterName:    "mymaster",
		SentinelAddrs: []string{"sentinel1:26379", "sentinel2:26379", "sentinel3:26379"},
	})
	defer redisClient.Close()
	backend, err := redisbackend.New(ctx, redisClient, redisbackend.Options{Replicas: 2})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer backend.Close()
}

// A cluster, without a URL. A URL for the same is redis+cluster://host1,host2,host3.
func ExampleNew_cluster() {
	ctx := context.Background()
	redisClient := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"host1:6379", "host2:6379", "host3:6379"}})
	defer redisClient.Close()
	backend, err := redisbackend.New(ctx, redisClient, redisbackend.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer backend.Close()
}

// A writer that lost its lock without noticing is refused by the value itself.
func ExampleGuard() {
	ctx := context.Background()
	redisClient := redis.NewClient(&redis.Options{Addr: exampleAddr()})
	defer redisClient.Close()
	guard := redisbackend.NewGuard(redisClient)

	const slow, fast = 1000, 1001 // the tokens of two locks, one after the other: lock.Token()
	fmt.Println(guard.Set(ctx, "balance/42", []byte("90"), slow))
	fmt.Println(guard.Set(ctx, "balance/42", []byte("75"), fast))
	err := guard.Set(ctx, "balance/42", []byte("80"), slow)
	fmt.Println(errors.Is(err, locker.ErrStaleToken))

	value, token, err := guard.Get(ctx, "balance/42")
	fmt.Println(string(value), token, err)
	// Output:
	// <nil>
	// <nil>
	// true
	// 75 1001 <nil>
}

// An operator sees who holds what, and takes a lock away from a holder that is stuck.
func ExampleBackend_Break() {
	ctx := context.Background()
	client, err := locker.Open(ctx, "redis://"+exampleAddr()+"?prefix=operator:", locker.WithHolder("worker 7"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	lock, err := client.Acquire(ctx, "report")
	if err != nil {
		fmt.Println(err)
		return
	}

	lister, _ := locker.As[locker.Lister](client.Locker())
	breaker, _ := locker.As[locker.Breaker](client.Locker())
	for held, err := range lister.List(ctx) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s is held by %q\n", held.Key, held.Holder)
		fmt.Println("broken:", breaker.Break(ctx, held))
	}

	select {
	case <-lock.Done():
	case <-time.After(time.Until(lock.Deadline())):
	}
	fmt.Println("lost:", errors.Is(lock.Err(), locker.ErrLost))
	// Output:
	// report is held by "worker 7"
	// broken: <nil>
	// lost: true
}
