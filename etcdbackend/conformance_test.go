package etcdbackend_test

import (
	"context"
	"flag"
	"os"
	"testing"

	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/etcdtest"
	"github.com/fec20105/locker/internal/servertest"
)

func TestMain(m *testing.M) {
	etcdtest.Serve()
	examples, err := servertest.StartEtcd(context.Background(), servertest.EtcdOptions{Private: true})
	if err == nil {
		exampleAddr = func() string { return examples.Addr }
	} else {
		_ = flag.Set("test.skip", "^Example") // tests skip themselves, or fail
	}
	code := m.Run()
	if err == nil {
		_ = examples.Stop()
	}
	os.Exit(code)
}

// exampleAddr is where the examples find an etcd.
var exampleAddr func() string

func TestConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, etcdtest.Harness(t, servertest.Etcd(t, servertest.EtcdOptions{Private: true})))
}

func TestConformanceCluster(t *testing.T) {
	t.Parallel()
	conformance.Run(t, etcdtest.ClusterHarness(t, servertest.EtcdThree(t)))
}
