package etcdbackend_test

import (
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/etcdbackend"
)

// open opens a Backend as another process would.
func open(t testing.TB, rawURL string) *etcdbackend.Backend {
	t.Helper()
	return openConfig(t, rawURL, locker.Config{})
}

func openConfig(t testing.TB, rawURL string, cfg locker.Config) *etcdbackend.Backend {
	t.Helper()
	l, err := locker.OpenLocker(t.Context(), rawURL, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l.(*etcdbackend.Backend)
}

// direct is a client without this package, to look behind it.
func direct(t testing.TB, serverURL string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: strings.Split(strings.TrimPrefix(serverURL, "etcd://"), ","), Logger: zap.NewNop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}
