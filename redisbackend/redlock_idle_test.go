package redisbackend

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker/internal/servertest"
)

// redlock_idle.lua answers the common case by itself. In whatever state a lock is, that must be what the rest of the script
// would have answered, and leave the same behind.
func TestRedlockIdleDoesAsTheRest(t *testing.T) {
	t.Parallel()
	const early = " state and marker and"
	rest := strings.Replace(redlockAcquireScript.source, early, " false and", 1)
	if rest == redlockAcquireScript.source {
		t.Fatalf("redlock_idle.lua has no %q: say here how to leave it out", early)
	}
	client := redis.NewClient(&redis.Options{Addr: servertest.Redis(t, servertest.RedisOptions{Private: true}).Addr})
	t.Cleanup(func() { _ = client.Close() })

	const (
		me, channel, other = "019aa76d-me", "channel", "019aa76d-ot"
		quarantine         = 60_000_000
		second, day        = 1_000_000, 86400
	)
	now := time.Now().UnixMicro()
	token := now - second // proposed
	var states []string
	for _, last := range []int64{token - 1, token, token + second} {
		for _, until := range []int64{0, now - second, now + 600*second} {
			for _, covers := range []int64{now/second + 5, now/second + day} {
				for _, id := range []string{other, other + "-longer", "short", me, "\x7f"} {
					for _, head := range []string{"", me + " " + channel, "waiter elsewhere"} {
						since := int64(0)
						if until == 0 {
							since = now - 2*second
						}
						owner := id + " its-channel 1 label"
						if id == "\x7f" {
							owner = id + " - "
						}
						states = append(states, fmt.Sprintf("%016d %016d %016d %010d %04d %s%s", last, until, since, covers, len(head), owner, head))
					}
				}
			}
		}
	}
	states = append(states, "")
	markers := map[string]string{
		"old": fmt.Sprint("run ", now-3600*second), "young": fmt.Sprint("run ", now-quarantine/2), "none": "",
		"old, but not older than the token": fmt.Sprint("run ", token-quarantine+second/2),
	}
	granted := 0
	markers["old, and somebody waits"] = markers["old"]
	for name, marker := range markers {
		for _, mode := range []string{"", "once", "poll"} {
			for _, gone := range []bool{false, true} {
				for i, state := range states {
					if gone && i > 0 {
						break
					}
					var seen [2]string
					for j, source := range []string{redlockAcquireScript.source, rest} {
						pipe := client.Pipeline()
						pipe.FlushDB(t.Context())
						if state != "" {
							pipe.Set(t.Context(), "k", state, time.Hour)
						}
						if marker != "" {
							pipe.Set(t.Context(), "marker", marker, 0)
						}
						if gone {
							pipe.Set(t.Context(), "k:gone:"+me, "done", time.Hour)
						}
						if strings.HasSuffix(name, "waits") {
							first := redis.Z{Score: float64(time.Now().UnixMicro()), Member: "waiter elsewhere"}
							pipe.ZAdd(t.Context(), "k:order", first)
							pipe.ZAdd(t.Context(), "k:seen", first)
						}
						args := []any{me, token, 15 * second, channel, "label", "marker", quarantine, token}
						if mode != "" {
							args = append(args, mode)
						}
						eval := pipe.Eval(t.Context(), source, []string{"k"}, args...)
						after := pipe.Get(t.Context(), "k")
						ttl := pipe.TTL(t.Context(), "k")
						tombstones := pipe.MGet(t.Context(), "k:gone:"+other, "k:gone:"+other+"-longer", "k:gone:short", "k:gone:"+me)
						life := pipe.PTTL(t.Context(), "k:gone:"+other)
						queue := pipe.ZRange(t.Context(), "k:order", 0, -1)
						_, _ = pipe.Exec(t.Context()) // of nothing, Get answers an error
						reply, err := eval.Slice()
						if err != nil {
							t.Fatalf("%q: %v", state, err)
						}
						seen[j] = describe(reply, after.Val(), ttl.Val(), tombstones.Val(), life.Val() > 10*time.Second, queue.Val())
						if j == 0 && reply[1] == token && state != "" {
							granted++
						}
					}
					if seen[0] != seen[1] {
						t.Fatalf("state %q, marker %s, mode %q, gone %v:\n%s\nwithout redlock_idle.lua:\n%s", state, name, mode, gone, seen[0], seen[1])
					}
				}
			}
		}
	}
	if granted == 0 {
		t.Error("no case was granted with the proposed token")
	}
}

// describe tells what an acquire has answered and left behind, with times counted from the server's.
func describe(reply []any, state string, ttl time.Duration, more ...any) string {
	now := reply[0].(int64)
	what := fmt.Sprint(reply[1])
	if len(reply) > 3 {
		what = fmt.Sprint(what, (reply[2].(int64)+60_000_000)/120_000_000, reply[3:]) // a remaining time: 0 or about 600 s, and some passes
	}
	if len(state) > 67 {
		var until int64
		_, _ = fmt.Sscanf(state[17:33], "%d", &until)
		if until == now+15_000_000 {
			state = state[:17] + "now and the TTL." + state[33:]
			covers := state[51:61]
			if fresh := fmt.Sprint(now/1_000_000 + 15 + 86400); covers >= fresh { // rounded by the second
				state = state[:51] + "fresh....." + state[61:]
			}
		}
	}
	return fmt.Sprint(what, " ", state, " ", ttl.Round(time.Minute), " ", more)
}
