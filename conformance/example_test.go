package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/membackend"
)

// harness is that of the memory backend: each Locker is a client of one store.
func harness() conformance.Harness {
	store := membackend.NewStore()
	return conformance.Harness{
		TTL: time.Second,
		Open: func(_ context.Context, net *conformance.Network) (locker.Locker, error) {
			return net.Wrap(store.Locker()), nil
		},
	}
}

// A backend's test is one call.
func ExampleRun() {
	testConformance := func(t *testing.T) { conformance.Run(t, harness()) }
	_ = testConformance
}

// A program checks the server that it is going to use.
func ExampleCheck() {
	err := conformance.Check(context.Background(), harness(), func(r conformance.Result) {
		fmt.Println(r)
	})
	if err != nil {
		fmt.Println(err)
	}
}

// Faults can be injected into a program's own tests, too.
func ExampleNetwork() {
	net := conformance.NewNetwork()
	defer net.Close()
	client, err := locker.New(net.Wrap(membackend.New()), locker.WithTTL(200*time.Millisecond))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	err = client.Do(context.Background(), "invoice/42", func(ctx context.Context, _ *locker.Lock) error {
		net.Cut()
		<-ctx.Done() // the work is told
		net.Heal()
		return nil
	})
	fmt.Println("lost:", errors.Is(err, locker.ErrLost))
	// Output: lost: true
}
