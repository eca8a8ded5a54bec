package redisbackend_test

import (
	"context"
	"flag"
	"os"
	"testing"

	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
)

func TestMain(m *testing.M) {
	redistest.Serve()
	examples, err := servertest.StartRedis(context.Background(), servertest.RedisOptions{Private: true})
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

// exampleAddr is where the examples find a Redis.
var exampleAddr func() string

// TestConformance runs on the server that LOCKER_TEST_REDIS names, else on a private one, which the suite also hurts.
func TestConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, redistest.Harness(t, servertest.Redis(t, servertest.RedisOptions{})))
}

// TestRedlockConformance runs the suite on five servers of its own.
func TestRedlockConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, redistest.RedlockHarness(t, servertest.RedisServers(t, 5)))
}

func TestSentinelConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, redistest.SentinelHarness(t, servertest.Sentinel(t, servertest.SentinelOptions{})))
}

func TestClusterConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, redistest.ClusterHarness(t, servertest.Cluster(t, "")))
}
