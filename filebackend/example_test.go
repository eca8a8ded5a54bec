//go:build linux

package filebackend_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/filebackend"
)

// exampleFolder stands for a folder such as /var/lib/myapp/locks.
func exampleFolder() string {
	folder, err := os.MkdirTemp("", "locker-example-")
	if err != nil {
		log.Fatal(err)
	}
	return folder
}

func ExampleNew() {
	ctx := context.Background()
	folder := exampleFolder()
	defer os.RemoveAll(folder)

	backend, err := filebackend.New(ctx, folder)
	if err != nil {
		log.Fatal(err)
	}
	defer backend.Close()
	client, err := locker.New(backend)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	err = client.Do(ctx, "nightly report", func(context.Context, *locker.Lock) error {
		fmt.Println("no other process of this host writes the report")
		return nil
	})
	fmt.Println(err)
	// Output:
	// no other process of this host writes the report
	// <nil>
}

// A URL chooses the backend at startup.
func Example_url() {
	ctx := context.Background()
	folder := exampleFolder()
	defer os.RemoveAll(folder)

	client, err := locker.Open(ctx, "file://"+folder, locker.WithHolder("the first"))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Acquire(ctx, "nightly report"); err != nil {
		log.Fatal(err)
	}
	holding, err := client.Inspect(ctx, "nightly report")
	fmt.Println(holding.Holder, err)
	// Output:
	// the first <nil>
}

// A writer whose lock was lost does not overwrite what its successor wrote.
func ExampleGuard() {
	ctx := context.Background()
	folder := exampleFolder()
	defer os.RemoveAll(folder)

	guard := filebackend.NewGuard(folder)
	if err := guard.Set(ctx, "report.csv", []byte("the successor's"), 8); err != nil {
		log.Fatal(err)
	}
	err := guard.Set(ctx, "report.csv", []byte("late"), 7) // 7 and 8 are tokens: see locker.Lock.Token
	fmt.Println(errors.Is(err, locker.ErrStaleToken))
	value, token, err := guard.Get(ctx, "report.csv")
	fmt.Println(string(value), token, err)
	// Output:
	// true
	// the successor's 8 <nil>
}
