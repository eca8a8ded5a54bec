package locker_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// The examples run on a store in memory; a program opens a server by its URL.
func newExampleClient(opts ...locker.Option) (*membackend.Store, *locker.Client) {
	store := membackend.NewStore()
	client, err := locker.New(store.Locker(), opts...)
	if err != nil {
		log.Fatal(err)
	}
	return store, client
}

func Example() {
	ctx := context.Background()
	client, err := locker.Open(ctx, "mem://example") // redis://… in production
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	err = client.Do(ctx, "invoice/42", func(ctx context.Context, lock *locker.Lock) error {
		fmt.Println("charging under token", lock.Token())
		return ctx.Err() // it ends, with the cause, the moment the lock can no longer be trusted
	}, locker.WithTTL(10*time.Second))
	fmt.Println(err)
	// Output:
	// charging under token 1
	// <nil>
}

func ExampleNew() {
	client, err := locker.New(membackend.New(), locker.WithTTL(time.Minute), locker.WithHolder("nightly job"))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	_, err = locker.New(membackend.New(), locker.WithTTL(time.Second), locker.WithHeartbeat(time.Second))
	fmt.Println(err)
	// Output:
	// locker: open: a heartbeat every 1s does not keep a TTL of 1s alive: make it a third of the TTL
}

func ExampleOpen() {
	client, err := locker.Open(context.Background(), "mem://orders", locker.WithTTL(30*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.Close())

	_, err = locker.Open(context.Background(), "mem://orders?ttl=30s")
	fmt.Println(err)
	// Output:
	// <nil>
	// locker: mem: open: a parameter is unknown: mem:// has none
}

// A Locker can be decorated before a Client is made of it.
func ExampleOpenLocker() {
	l, err := locker.OpenLocker(context.Background(), "mem://decorated", locker.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	client, err := locker.New(decorator{l})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	fmt.Println(client.Locker().Capabilities().Backend)
	// Output: memory
}

func ExampleRegister() {
	locker.Register("example", func(_ context.Context, cfg locker.Config) (locker.Locker, error) {
		if cfg.URL.Host == "" {
			return nil, errors.New("name a host: example://HOST")
		}
		return membackend.New(), nil
	})
	_, err := locker.Open(context.Background(), "example://")
	fmt.Println(err)
	// Output: locker: example: open: name a host: example://HOST
}

func ExampleSchemes() {
	fmt.Println(slices.Contains(locker.Schemes(), "mem"))
	// Output: true
}

func ExampleClient_Do() {
	store, client := newExampleClient()
	defer client.Close()

	err := client.Do(context.Background(), "invoice/42", func(ctx context.Context, _ *locker.Lock) error {
		store.Expire("invoice/42") // an operator takes the lock away
		<-ctx.Done()
		return context.Cause(ctx)
	})
	fmt.Println(errors.Is(err, locker.ErrLost))
	// Output: true
}

func ExampleClient_Acquire() {
	ctx := context.Background()
	_, client := newExampleClient(locker.WithHolder("first"))
	defer client.Close()

	lock, err := client.Acquire(ctx, "k")
	if err != nil {
		log.Fatal(err)
	}
	_, err = client.Acquire(ctx, "k", locker.WithNoWait())
	fmt.Println(errors.Is(err, locker.ErrHeld))
	fmt.Println(lock.Release(ctx))
	// Output:
	// true
	// <nil>
}

func ExampleClient_Inspect() {
	ctx := context.Background()
	_, client := newExampleClient(locker.WithHolder("nightly job"))
	defer client.Close()

	lock, err := client.Acquire(ctx, "report")
	if err != nil {
		log.Fatal(err)
	}
	held, err := client.Inspect(ctx, "report")
	fmt.Println(held.Holder, held.Token == lock.Token(), err)
	// Output: nightly job true <nil>
}

// What not every backend can is found by As.
func ExampleClient_Locker() {
	ctx := context.Background()
	_, client := newExampleClient()
	defer client.Close()
	for _, key := range []string{"a", "b"} {
		if _, err := client.Acquire(ctx, key); err != nil {
			log.Fatal(err)
		}
	}
	if lister, ok := locker.As[locker.Lister](client.Locker()); ok {
		for held, err := range lister.List(ctx) {
			fmt.Println(held.Key, err)
		}
	}
	// Output:
	// a <nil>
	// b <nil>
}

func ExampleClient_Close() {
	_, client := newExampleClient()
	lock, err := client.Acquire(context.Background(), "k")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.Close())
	fmt.Println(lock.Err())
	// Output:
	// <nil>
	// locker: lock "k" (token 1) lost: closed
}

func ExampleAs() {
	ctx := context.Background()
	store, client := newExampleClient()
	defer client.Close()
	lock, err := client.Acquire(ctx, "stuck")
	if err != nil {
		log.Fatal(err)
	}

	operator := decorator{store.Locker()} // As looks through Unwrap
	if breaker, ok := locker.As[locker.Breaker](operator); ok {
		fmt.Println(breaker.Break(ctx, locker.Holding{Key: "stuck", Token: lock.Token()}))
	}
	<-lock.Done()
	fmt.Println(lock.Err())
	// Output:
	// <nil>
	// locker: lock "stuck" (token 1) lost: taken
}

// exampleLock is a lock on "k" in a new store.
func exampleLock(opts ...locker.Option) (*membackend.Store, *locker.Client, *locker.Lock) {
	store, client := newExampleClient(opts...)
	lock, err := client.Acquire(context.Background(), "k")
	if err != nil {
		log.Fatal(err)
	}
	return store, client, lock
}

func ExampleLock_Key() {
	_, client, lock := exampleLock()
	defer client.Close()
	fmt.Println(lock.Key())
	// Output: k
}

func ExampleLock_Token() {
	_, client, lock := exampleLock()
	defer client.Close()
	fmt.Printf("UPDATE account SET … WHERE token <= %d\n", lock.Token())
	// Output: UPDATE account SET … WHERE token <= 1
}

func ExampleLock_Context() {
	store, client, lock := exampleLock()
	defer client.Close()
	store.Expire("k")
	ctx := lock.Context()
	<-ctx.Done()
	fmt.Println(context.Cause(ctx))
	// Output: locker: lock "k" (token 1) lost: taken
}

func ExampleLock_Bind() {
	_, client, lock := exampleLock()
	defer client.Close()
	request, cancel := context.WithCancelCause(context.Background())
	ctx, stop := lock.Bind(request)
	defer stop()
	cancel(errors.New("the client hung up"))
	<-ctx.Done()
	fmt.Println(context.Cause(ctx))
	fmt.Println(lock.Release(context.Background()))
	// Output:
	// the client hung up
	// <nil>
}

func ExampleLock_Done() {
	_, client, lock := exampleLock(locker.WithTTL(50*time.Millisecond), locker.WithoutHeartbeat())
	defer client.Close()
	select {
	case <-lock.Done():
		fmt.Println(lock.Err())
	case <-time.After(time.Minute):
		fmt.Println("still held")
	}
	// Output: locker: lock "k" (token 1) lost: expired
}

// Err compares clocks when it is called, so it is worth a call before each write that must not come late.
func ExampleLock_Err() {
	_, client, lock := exampleLock()
	defer client.Close()
	fmt.Println(lock.Err())
	fmt.Println(lock.Release(context.Background()))
	fmt.Println(lock.Err())
	// Output:
	// <nil>
	// <nil>
	// locker: lock released
}

func ExampleLock_Deadline() {
	before := time.Now()
	_, client, lock := exampleLock(locker.WithTTL(10 * time.Second))
	defer client.Close()
	trusted := lock.Deadline().Sub(before) // 10 s less the margin of 102 ms, and counted from the sending
	fmt.Println(trusted.Round(time.Second/2), trusted < 10*time.Second)
	// Output: 10s true
}

func ExampleLock_Extend() {
	ctx := context.Background()
	store, client, lock := exampleLock(locker.WithoutHeartbeat())
	defer client.Close()
	fmt.Println(lock.Extend(ctx))
	store.Expire("k")
	fmt.Println(errors.Is(lock.Extend(ctx), locker.ErrLost))
	// Output:
	// <nil>
	// true
}

func ExampleLock_Release() {
	ctx := context.Background()
	_, client, lock := exampleLock()
	defer client.Close()
	fmt.Println(lock.Release(ctx))
	fmt.Println(lock.Release(ctx)) // the second call answers like the first
	// Output:
	// <nil>
	// <nil>
}

func ExampleGuard_Do() {
	var balances locker.Guard
	write := func(token uint64) {
		err := balances.Do("account/7", token, func() error {
			fmt.Println("written under token", token)
			return nil
		})
		if errors.Is(err, locker.ErrStaleToken) {
			fmt.Println("refused:", err)
		}
	}
	write(3)
	write(4)
	write(3) // its lock was lost long ago
	// Output:
	// written under token 3
	// written under token 4
	// refused: locker: guard "account/7": stale fencing token
}

func ExampleRequest_Validate() {
	fmt.Println(locker.Request{Key: "k", ID: "1", TTL: time.Millisecond}.Validate())
	// Output: a TTL of 1ms is too short: the least is 10ms
}

func ExampleCapabilities() {
	promises := membackend.New().Capabilities()
	fmt.Println("freed early by:", promises.EarlyFree)
	fmt.Println("tokens survive:", promises.Fencing)
	// Output:
	// freed early by: none
	// tokens survive: nothing
}

func ExampleHeldError() {
	ctx := context.Background()
	store, client, _ := exampleLock(locker.WithHolder("nightly job"), locker.WithTTL(time.Minute))
	defer client.Close()
	other, err := locker.New(store.Locker())
	if err != nil {
		log.Fatal(err)
	}
	defer other.Close()
	_, err = other.Acquire(ctx, "k", locker.WithNoWait())
	if held, ok := errors.AsType[*locker.HeldError](err); ok {
		fmt.Println("held by", held.Holder, "for", held.Remaining.Round(time.Minute))
	}
	// Output: held by nightly job for 1m0s
}

func ExampleLostError() {
	err := error(&locker.LostError{Key: "k", Token: 7, Reason: locker.ReasonMaxHold})
	fmt.Println(errors.Is(err, locker.ErrLost), err)
	// Output: true locker: lock "k" (token 7) lost: max hold
}

func ExampleDoError() {
	store, client := newExampleClient()
	defer client.Close()
	err := client.Do(context.Background(), "k", func(context.Context, *locker.Lock) error {
		store.Expire("k")
		return errors.New("half done")
	})
	if failed, ok := errors.AsType[*locker.DoError](err); ok {
		fmt.Println(failed.Lost.Reason, "-", failed.Work)
	}
	// Output: taken - half done
}

func ExampleError() {
	err := error(&locker.Error{Op: "acquire", Key: "k", Backend: "redis", Err: errors.New("connection refused")})
	fmt.Println(err)
	// Output: locker: redis: acquire "k": connection refused
}

func ExampleWithLogger() {
	short := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.MessageKey {
			return slog.Attr{}
		}
		return a
	}}
	_, client := newExampleClient(locker.WithLogger(slog.New(slog.NewTextHandler(os.Stdout, short))))
	defer client.Close()
	err := client.Do(context.Background(), "k", func(context.Context, *locker.Lock) error {
		return client.Locker().Close() // the server goes away: nobody knows how the release ends
	})
	fmt.Println(err)
	// Output:
	// level=WARN key=k token=1 error="locker: memory: release \"k\": closed"
	// <nil>
}
