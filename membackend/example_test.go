package membackend_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

func ExampleNew() {
	client, err := locker.New(membackend.New())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	err = client.Do(context.Background(), "invoice/42", func(_ context.Context, lock *locker.Lock) error {
		fmt.Println("charging under token", lock.Token())
		return nil
	})
	fmt.Println(err)
	// Output:
	// charging under token 1
	// <nil>
}

// Several Lockers of one Store exclude each other like several processes.
func ExampleNewStore() {
	ctx := context.Background()
	store := membackend.NewStore()
	monday, err := locker.New(store.Locker(), locker.WithHolder("monday's job"))
	if err != nil {
		log.Fatal(err)
	}
	defer monday.Close()
	tuesday, err := locker.New(store.Locker(), locker.WithNoWait())
	if err != nil {
		log.Fatal(err)
	}
	defer tuesday.Close()

	if _, err := monday.Acquire(ctx, "report"); err != nil {
		log.Fatal(err)
	}
	_, err = tuesday.Acquire(ctx, "report")
	fmt.Println(errors.Is(err, locker.ErrHeld))
	held, _ := errors.AsType[*locker.HeldError](err)
	fmt.Println(held.Holder)
	// Output:
	// true
	// monday's job
}

// Expire shows what a program does when its lock is taken away.
func ExampleStore_Expire() {
	backend := membackend.New()
	client, err := locker.New(backend)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	err = client.Do(context.Background(), "invoice/42", func(ctx context.Context, _ *locker.Lock) error {
		backend.Store().Expire("invoice/42")
		<-ctx.Done()
		return nil
	}, locker.WithCompensation(func(_ context.Context, lost *locker.LostError) error {
		fmt.Println("refund of what was done under token", lost.Token)
		return nil
	}))
	fmt.Println(err)
	// Output:
	// refund of what was done under token 1
	// locker: lock "invoice/42" (token 1) lost: taken
}

func ExampleStore_Holdings() {
	ctx := context.Background()
	backend := membackend.New()
	client, err := locker.New(backend, locker.WithHolder("worker 7"))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, key := range []string{"b", "a"} {
		if _, err := client.Acquire(ctx, key); err != nil {
			log.Fatal(err)
		}
	}
	for _, h := range backend.Store().Holdings() {
		fmt.Println(h.Key, h.Holder, h.Token)
	}
	// Output:
	// a worker 7 2
	// b worker 7 1
}

// A URL chooses the backend at startup. In the tests of a program it can be a store in memory: everybody who opens
// the same name shares it.
func Example_url() {
	ctx := context.Background()
	client, err := locker.Open(ctx, "mem://example")
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	lock, err := client.Acquire(ctx, "report")
	if err != nil {
		log.Fatal(err)
	}

	other, err := locker.Open(ctx, "mem://example")
	if err != nil {
		log.Fatal(err)
	}
	defer other.Close()
	_, err = other.Acquire(ctx, "report", locker.WithNoWait())
	fmt.Println(errors.Is(err, locker.ErrHeld))

	if err := lock.Release(ctx); err != nil {
		log.Fatal(err)
	}
	_, err = other.Acquire(ctx, "report", locker.WithNoWait())
	fmt.Println(err)
	// Output:
	// true
	// <nil>
}
