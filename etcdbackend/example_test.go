package etcdbackend_test

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/etcdbackend"
)

// A program that has an etcd client already gives it to New. Programs that do not can say
// locker.Open(ctx, "etcd://h1:2379,h2:2379,h3:2379/myapp") instead.
func ExampleNew() {
	ctx := context.Background()
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{exampleAddr()}, Logger: zap.NewNop()})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer etcd.Close()

	backend, err := etcdbackend.New(ctx, etcd, etcdbackend.Options{Prefix: "myapp/locks/"})
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

// A writer that lost its lock without noticing is refused by the transaction that would write.
func ExampleGuard() {
	ctx := context.Background()
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{exampleAddr()}, Logger: zap.NewNop()})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer etcd.Close()
	guard := etcdbackend.NewGuard(etcd)

	const slow, fast = 1000, 1001 // the tokens of two locks, one after the other: lock.Token()
	write := func(balance string, token uint64) error {
		_, err := guard.Write(ctx, "fence/balance/42", token, clientv3.OpPut("balance/42", balance))
		return err
	}
	fmt.Println(write("90", slow))
	fmt.Println(write("75", fast))
	fmt.Println(errors.Is(write("80", slow), locker.ErrStaleToken))

	stored, err := etcd.Get(ctx, "balance/42")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(stored.Kvs[0].Value))
	// Output:
	// <nil>
	// <nil>
	// true
	// 75
}
