package servertest

import (
	"testing"
)

func TestSentinel(t *testing.T) {
	t.Parallel()
	g := Sentinel(t, SentinelOptions{Password: "s3cret", SentinelPassword: "other"})
	first, err := g.Primary(t.Context())
	if err != nil || first != 0 {
		t.Fatalf("the primary is %d: %v", first, err)
	}
	if _, err := g.Members[first].ask(t.Context(), "SET", "k", "v"); err != nil {
		t.Fatal(err)
	}
	if err := g.Failover(t.Context()); err != nil {
		t.Fatal(err)
	}
	second, err := g.Primary(t.Context())
	if err != nil || second == first {
		t.Fatalf("the primary was %d, was replaced, and is %d: %v", first, second, err)
	}

	// Each knows its role when it comes back, also without its data.
	if err := g.Each(func(s *Server) error { return s.Crash(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if fourth, err := g.Primary(t.Context()); err != nil || fourth != second {
		t.Errorf("the primary was %d, all were killed, and it is %d: %v", second, fourth, err)
	}
	if err := g.Each(func(s *Server) error { return s.Wipe(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	fifth, err := g.Primary(t.Context())
	if err != nil || fifth != second {
		t.Errorf("the primary was %d, all were wiped, and it is %d: %v", second, fifth, err)
	}
	if v, err := g.Members[fifth].ask(t.Context(), "GET", "k"); v != nil || err != nil {
		t.Errorf("after a wipe there is %v: %v", v, err)
	}

	if err := g.Members[fifth].Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sixth, err := g.Primary(t.Context()); err != nil || sixth == fifth {
		t.Errorf("the primary %d was killed, and now it is %d: %v", fifth, sixth, err)
	}
	if err := g.Members[fifth].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}
