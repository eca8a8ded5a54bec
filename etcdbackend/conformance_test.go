package etcdbackend_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/servertest"
)

// serveURL makes this test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_ETCDBACKEND_SERVE"

func TestMain(m *testing.M) {
	if url := os.Getenv(serveURL); url != "" {
		if err := conformance.Serve(context.Background(), opener(url)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
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

// opener opens the Lockers of the suite.
func opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		return locker.OpenLocker(ctx, rawURL, locker.Config{Dial: net.DialContext})
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	server := servertest.Etcd(t, servertest.EtcdOptions{Private: true})
	h := harness(t, server.URL)
	// Not Wipe: an etcd without its data is another etcd, whose revisions begin anew.
	h.Server = conformance.Server{Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart}
	conformance.Run(t, h)
}

func harness(t *testing.T, serverURL string) conformance.Harness {
	const prefix = "conformance/"
	rawURL := serverURL + "/" + prefix
	admin := direct(t, serverURL)
	operator := open(t, rawURL)
	return conformance.Harness{
		TTL:  2 * time.Second, // the least that a server with its default settings grants
		Open: opener(rawURL),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		EndWait: func(ctx context.Context, waiting locker.Request) error {
			found, err := admin.Get(ctx, prefix+waiting.Key, clientv3.WithPrefix())
			if err != nil {
				return err
			}
			for _, kv := range found.Kvs {
				if strings.Contains(string(kv.Value), waiting.ID) {
					_, err := admin.Revoke(ctx, clientv3.LeaseID(kv.Lease))
					return err
				}
			}
			return errors.New("it does not wait")
		},
		Process: func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), serveURL+"="+rawURL)
			return cmd
		},
		Leftovers: func(ctx context.Context) (all, immortal []string, err error) {
			found, err := admin.Get(ctx, prefix, clientv3.WithPrefix())
			if err != nil {
				return nil, nil, err
			}
			for _, kv := range found.Kvs {
				all = append(all, string(kv.Key))
				if kv.Lease == 0 {
					immortal = append(immortal, string(kv.Key))
				}
			}
			return all, immortal, nil
		},
		Artifacts: t.TempDir(),
	}
}

// Not parallel: four servers and two suites at once are too much for a small machine, and leases of 2 s end by themselves.
func TestConformanceCluster(t *testing.T) {
	cluster := servertest.EtcdThree(t)
	h := harness(t, cluster.URL)
	h.Cluster = conformance.Cluster{
		Leader: cluster.Leader, MoveLeader: cluster.MoveLeader,
		Election: 2500 * time.Millisecond, // one to two election timeouts of 1 s, and the vote
	}
	for _, m := range cluster.Members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{Pause: m.Pause, Resume: m.Resume, Kill: m.Kill, Start: m.Start})
	}
	conformance.Run(t, h)
}
