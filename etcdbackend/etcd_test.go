package etcdbackend_test

import (
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/etcdbackend"
	"github.com/fec20105/locker/internal/etcdtest"
)

// open opens a Backend as another process would.
func open(t testing.TB, rawURL string) *etcdbackend.Backend {
	t.Helper()
	return openConfig(t, rawURL, locker.Config{})
}

func openConfig(t testing.TB, rawURL string, cfg locker.Config) *etcdbackend.Backend {
	t.Helper()
	return etcdtest.Open(t, rawURL, cfg)
}

// direct is a client without this package, to look behind it.
func direct(t testing.TB, serverURL string) *clientv3.Client {
	t.Helper()
	return etcdtest.Direct(t, serverURL)
}
