package etcdbackend_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/internal/servertest"
)

// TestKeysAreUsedAgain: etcd keeps a trace of every key until it is compacted, and reading a queue takes longer with each.
func TestKeysAreUsedAgain(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	admin := direct(t, server.URL)
	before, err := admin.Get(t.Context(), "none")
	if err != nil {
		t.Fatal(err)
	}
	b := open(t, server.URL)
	const pairs = 100
	for range pairs {
		lease, err := b.Acquire(t.Context(), locker.Request{Key: "often", ID: uuid.NewString(), TTL: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Release(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
	}
	// What the server remembers of all that.
	puts, keys := 0, map[string]bool{}
	for resp := range admin.Watch(t.Context(), "locker/often", clientv3.WithPrefix(), clientv3.WithRev(before.Header.Revision+1), clientv3.WithFilterDelete()) {
		if err := resp.Err(); err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Events {
			puts++
			keys[string(e.Kv.Key)] = true
		}
		if puts == pairs {
			break
		}
	}
	if len(keys) > 3 {
		t.Errorf("%d locks, one after the other, have left traces of %d keys", pairs, len(keys))
	}
}
