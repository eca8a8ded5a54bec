package redisbackend

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker/internal/servertest"
)

// A subscription on which nothing is heard is probed, and not made anew.
func TestSilentSubscription(t *testing.T) {
	t.Parallel()
	server := servertest.Redis(t, servertest.RedisOptions{Private: true})
	client := redis.NewClient(&redis.Options{Addr: server.Addr})
	defer client.Close()
	n := newNotices(client, "silent")
	n.pingInterval = 20 * time.Millisecond
	g := &grant{wake: make(chan struct{}, 1)}
	n.add("id", g)
	defer func() { <-n.stop() }()
	woken := func() bool {
		select {
		case <-g.wake:
			return true
		case <-time.After(5 * time.Second):
			return false
		}
	}
	if !woken() {
		t.Fatal("a waiter is not told to look when the subscription begins")
	}
	time.Sleep(200 * time.Millisecond)
	if len(g.wake) > 0 {
		t.Error("the subscription was made anew")
	}
	if err := client.Publish(t.Context(), "silent", "wake id").Err(); err != nil || !woken() {
		t.Errorf("the waiter was not woken (%v)", err)
	}

	// It is made anew when the server is back, and everybody looks.
	if err := server.Crash(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !woken() {
		t.Error("a waiter is not told to look when the subscription begins again")
	}
}
