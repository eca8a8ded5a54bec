package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/internal/etcdtest"
	"github.com/fec20105/locker/internal/pgtest"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
)

// The suites run one after another: each loads the machine with servers, and is about time. The other tests, which mostly
// wait, run together after them.

func TestRedis(t *testing.T) {
	conformance.Run(t, redistest.Harness(t, startRedis(t, imageOf(t, "redis"))))
}

func TestRedlock(t *testing.T) {
	conformance.Run(t, redistest.RedlockHarness(t, startRedlock(t, 5)))
}

func TestEtcd(t *testing.T) {
	conformance.Run(t, etcdtest.Harness(t, startEtcd(t, imageOf(t, "etcd"))))
}

func TestEtcdCluster(t *testing.T) {
	cluster := startEtcdCluster(t)
	h := etcdtest.ClusterHarness(t, &cluster.EtcdCluster)
	h.Cluster.Isolate, h.Cluster.Rejoin = cluster.isolate, cluster.rejoin
	conformance.Run(t, h)
}

func TestPostgres(t *testing.T) {
	conformance.Run(t, pgtest.Harness(t, startPostgres(t, imageOf(t, "postgres")), ""))
}

// TestRefused is about servers that are too old: an error must say so at once, and name what is needed.
func TestRefused(t *testing.T) {
	docker, err := engine()
	if err != nil {
		servertest.Skip(t, "containers", err.Error())
	}
	for _, v := range versions {
		if !v.refused {
			continue
		}
		t.Run(v.name(), func(t *testing.T) {
			if _, err := docker.ImageInspect(t.Context(), v.image()); err != nil {
				t.Skipf("%s is not there (make images makes it)", v.image()) // no machine can be required to have what nobody should use
			}
			start, oldest := startRedis, "6.2"
			if v.server == "postgres" {
				start, oldest = startPostgres, "14"
			}
			l, err := locker.OpenLocker(t.Context(), start(t, v.image()).URL, locker.Config{})
			if err == nil {
				_, err = l.Acquire(context.Background(), locker.Request{Key: "k", ID: uuid.NewString(), TTL: time.Minute, NoWait: true})
				defer l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), v.number) || !strings.Contains(err.Error(), "the oldest that works is "+oldest) {
				t.Errorf("got the error %v, want one that names %s and the oldest that works", err, v.number)
			}
		})
	}
}
