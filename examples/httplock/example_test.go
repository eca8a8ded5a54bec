package httplock_test

import (
	"context"
	"fmt"
	"net/http/httptest"
	"strings"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/examples/httplock"
)

func Example() {
	server := httptest.NewServer(httplock.NewServer())
	defer server.Close()

	client, err := locker.Open(context.Background(), strings.Replace(server.URL, "http", "httplock", 1))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	err = client.Do(context.Background(), "invoice/42", func(_ context.Context, lock *locker.Lock) error {
		fmt.Println("working under the lock", lock.Key())
		return nil
	})
	fmt.Println("done:", err)
	// Output:
	// working under the lock invoice/42
	// done: <nil>
}
