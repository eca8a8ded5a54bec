package servertest

import (
	"context"
	"testing"
)

func TestEtcd(t *testing.T) {
	t.Parallel()
	s := Etcd(t, EtcdOptions{Private: true})
	api := &etcdAPI{scheme: "http", addr: s.Addr}
	put := map[string]string{"key": "aw==", "value": "djE="} // k, v1
	if err := api.call(t.Context(), "POST", "/v3/kv/put", put, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	has := func() bool {
		var found struct{ Count string }
		if err := api.call(t.Context(), "POST", "/v3/kv/range", map[string]string{"key": "aw=="}, &found); err != nil {
			t.Fatal(err)
		}
		return found.Count == "1"
	}
	for name, hurt := range map[string]func(context.Context) error{"crash": s.Crash, "restart": s.Restart} {
		if err := hurt(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !has() {
			t.Errorf("after a %s what was written is gone", name)
		}
	}
	if err := s.Wipe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if has() {
		t.Error("after a wipe what was written is there")
	}
}

func TestEtcdTLS(t *testing.T) {
	t.Parallel()
	s := Etcd(t, EtcdOptions{ClientCert: true})
	with := &etcdAPI{scheme: "https", addr: s.Addr, tls: s.TLS}
	if err := with.healthy(t.Context()); err != nil {
		t.Error(err)
	}
	without := &etcdAPI{scheme: "https", addr: s.Addr, tls: s.TLS.Clone()}
	without.tls.Certificates = nil
	if without.healthy(t.Context()) == nil {
		t.Error("the server wants a certificate, and answered without one")
	}
}

func TestEtcdCluster(t *testing.T) {
	t.Parallel()
	c := EtcdThree(t)
	first, err := c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.MoveLeader(t.Context()); err != nil {
		t.Fatal(err)
	}
	second, err := c.Leader(t.Context())
	if err != nil || second == first {
		t.Fatalf("the leader was %d, was moved, and is %d: %v", first, second, err)
	}
	if err := c.Members[second].Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if third, err := c.Leader(t.Context()); err != nil || third == second {
		t.Fatalf("the leader %d was killed, and now it is %d: %v", second, third, err)
	}
	if err := c.Members[second].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	third, err := c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Members[third].Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fourth, err := c.Leader(t.Context()); err != nil || fourth == third {
		t.Errorf("the leader %d was paused, and now it is %d: %v", third, fourth, err)
	}
	if err := c.Members[third].Resume(t.Context()); err != nil {
		t.Error(err)
	}
}
