// Package etcdtest hooks the conformance suite up to etcdbackend, for servers of any kind: processes of this machine,
// given ones, and containers.
package etcdtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/etcdbackend"
	"github.com/fec20105/locker/internal/servertest"
)

// serveURL makes a test program a process that conformance starts: it serves Lockers on that server.
const serveURL = "LOCKER_ETCDTEST_SERVE"

// Serve is the first call of a TestMain: it does not return in a process that conformance has started.
func Serve() {
	url := os.Getenv(serveURL)
	if url == "" {
		return
	}
	if err := conformance.Serve(context.Background(), Opener(url)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Opener opens the Lockers of the suite.
func Opener(rawURL string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		return locker.OpenLocker(ctx, rawURL, locker.Config{Dial: net.DialContext})
	}
}

// Open opens a Backend as another process would.
func Open(tb testing.TB, rawURL string, cfg locker.Config) *etcdbackend.Backend {
	tb.Helper()
	l, err := locker.OpenLocker(tb.Context(), rawURL, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return l.(*etcdbackend.Backend)
}

// Direct is a client without etcdbackend, to look behind it.
func Direct(tb testing.TB, serverURL string) *clientv3.Client {
	tb.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: strings.Split(strings.TrimPrefix(serverURL, "etcd://"), ","), Logger: zap.NewNop(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Harness is for a server that the suite hurts.
func Harness(tb testing.TB, server *servertest.Server) conformance.Harness {
	h := harness(tb, server.URL)
	// Not Wipe: an etcd without its data is another etcd, whose revisions begin anew.
	h.Server = conformance.Server{Pause: server.Pause, Resume: server.Resume, Crash: server.Crash, Restart: server.Restart}
	return h
}

// ClusterHarness is for a cluster whose members the suite hurts.
func ClusterHarness(tb testing.TB, cluster *servertest.EtcdCluster) conformance.Harness {
	h := harness(tb, cluster.URL)
	h.Cluster = conformance.Cluster{
		Leader: cluster.Leader, MoveLeader: cluster.MoveLeader,
		Election: 2500 * time.Millisecond, // one to two election timeouts of 1 s, and the vote
	}
	for _, m := range cluster.Members {
		h.Cluster.Members = append(h.Cluster.Members, conformance.Server{Pause: m.Pause, Resume: m.Resume, Kill: m.Kill, Start: m.Start})
	}
	return h
}

func harness(tb testing.TB, serverURL string) conformance.Harness {
	const prefix = "conformance/"
	rawURL := serverURL + "/" + prefix
	admin := Direct(tb, serverURL)
	operator := Open(tb, rawURL, locker.Config{})
	return conformance.Harness{
		TTL:  2 * time.Second, // the least that a server with its default settings grants
		Open: Opener(rawURL),
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
		Artifacts: tb.TempDir(),
	}
}
