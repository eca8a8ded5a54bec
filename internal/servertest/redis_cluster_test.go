package servertest

import (
	"strings"
	"testing"
)

func TestRedisCluster(t *testing.T) {
	t.Parallel()
	c := Cluster(t, "s3cret")
	slot, err := c.SlotOf(t.Context(), "{k}")
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.Owner(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[first].ask(t.Context(), "SET", "{k}1", "v"); err != nil {
		t.Fatal(err)
	}
	if err := c.Failover(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	second, err := c.Owner(t.Context(), slot)
	if err != nil || second == first {
		t.Fatalf("the owner was %d, was replaced, and is %d: %v", first, second, err)
	}

	to := (first + 1) % clusterPrimaries
	r, err := c.Reshard(t.Context(), slot, to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[second].ask(t.Context(), "GET", "{k}2"); err == nil || !strings.HasPrefix(err.Error(), "ASK") {
		t.Errorf("a key that is not there: %v, want ASK", err)
	}
	if err := r.Move(t.Context(), "{k}1"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[second].ask(t.Context(), "GET", "{k}1"); err == nil || !strings.HasPrefix(err.Error(), "ASK") {
		t.Errorf("a key that was moved: %v, want ASK", err)
	}
	if err := r.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[second].ask(t.Context(), "GET", "{k}1"); err == nil || !strings.HasPrefix(err.Error(), "MOVED") {
		t.Errorf("a key of a slot that was moved: %v, want MOVED", err)
	}
	if owner, err := c.Owner(t.Context(), slot); owner != to || err != nil {
		t.Errorf("the slot was moved to %d, and is that of %d: %v", to, owner, err)
	}

	if err := c.Members[to].Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	third, err := c.Owner(t.Context(), slot)
	if err != nil || third == to {
		t.Fatalf("the owner %d was killed, and now it is %d: %v", to, third, err)
	}
	if v, err := c.Members[third].ask(t.Context(), "GET", "{k}1"); v != "v" || err != nil {
		t.Errorf("the new owner has %v: %v", v, err)
	}
	if err := c.Members[to].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Isolate(t.Context(), third); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Members[third].ask(t.Context(), "SET", "{k}2", "of the isolated"); err != nil {
		t.Errorf("an isolated primary notices at once: %v", err)
	}
	if owner, err := c.Owner(t.Context(), slot); err != nil || owner == third {
		t.Errorf("the owner %d was isolated, and now it is %d: %v", third, owner, err)
	}
	if _, err := c.Members[third].ask(t.Context(), "SET", "{k}2", "of the isolated"); err == nil || !strings.HasPrefix(err.Error(), "CLUSTERDOWN") {
		t.Errorf("an isolated primary answers %v, want CLUSTERDOWN", err)
	}
	if err := c.Rejoin(t.Context(), third); err != nil {
		t.Fatal(err)
	}
	if err := c.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Each(func(s *Server) error { return s.Wipe(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if err := c.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	fourth, err := c.Owner(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := c.Members[fourth].ask(t.Context(), "GET", "{k}1"); v != nil || err != nil {
		t.Errorf("after a wipe there is %v: %v", v, err)
	}
}
