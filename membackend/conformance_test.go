package membackend_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/membackend"
)

// TestConformance has no child processes and no server to restart: a store lives and dies with its process. The
// conformance package's own tests run those rows on a store behind a server of theirs.
func TestConformance(t *testing.T) {
	t.Parallel()
	store := membackend.NewStore()
	conformance.Run(t, conformance.Harness{
		TTL: time.Second,
		Open: func(_ context.Context, net *conformance.Network) (locker.Locker, error) {
			return net.Wrap(store.Locker()), nil
		},
		Expire: func(_ context.Context, lease locker.Lease) error {
			if !store.Expire(lease.Key) {
				return errors.New("nobody held it")
			}
			return nil
		},
		Leftovers: func(context.Context) (all, immortal []string, err error) {
			for _, h := range store.Holdings() {
				all = append(all, h.Key)
			}
			return all, nil, nil
		},
		Artifacts: t.TempDir(),
	})
}
