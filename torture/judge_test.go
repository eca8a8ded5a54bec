package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// lock is what a worker says of a lock that it asked for at call, believed in from then on, and gave up.
func lock(worker int, token uint64, call, from, to time.Duration) []event {
	return []event{
		{Kind: kindAcquired, Worker: worker, Life: 1, Lock: int(token), Key: "k", Token: token, Call: call, At: from, Until: from + 100},
		{Kind: kindBelieved, Worker: worker, Life: 1, Lock: int(token), Key: "k", Token: token, At: to, Until: from + 100},
	}
}

// use is a look or a write of a worker's lock.
func use(kind string, worker int, token uint64, at time.Duration, guarded int) event {
	return event{Kind: kind, Worker: worker, Life: 1, Lock: int(token), Key: "k", Token: token, At: at, Seen: versions{Guarded: guarded}}
}

func fault(worker int, at time.Duration, text string) event {
	return event{Kind: kindFault, Worker: worker, At: at, Text: text}
}

func TestJudge(t *testing.T) {
	a, b := lock(1, 5, 10, 20, 60), lock(2, 6, 40, 50, 90) // overlap from 50 to 60
	sure := func(e event) event {
		e.Sure = true
		return e
	}
	pg := locker.EarlyFreeDisconnect | locker.EarlyFreeRestart
	for name, c := range map[string]struct {
		early   locker.EarlyFree
		events  []event
		want    []string
		refused int // writes, by the guard
	}{
		"one after the other":               {events: append(lock(1, 5, 10, 20, 30), lock(2, 6, 15, 30, 40)...)},
		"told in another order":             {events: append(lock(2, 6, 15, 30, 40), lock(1, 5, 10, 20, 30)...)},
		"two at once":                       {events: []event{a[0], b[0], a[1], b[1]}, want: []string{"overlap"}},
		"two at once, the later ends first": {events: []event{a[0], b[0], b[1], a[1]}, want: []string{"overlap"}},
		"evicted by its reset link":         {early: pg, events: []event{a[0], fault(1, 30, "reset"), b[0], a[1], b[1]}},
		"the other's link was reset":        {early: pg, events: []event{a[0], fault(2, 30, "reset"), b[0], a[1], b[1]}, want: []string{"overlap"}},
		"a reset link evicts nobody":        {events: []event{a[0], fault(1, 30, "reset"), b[0], a[1], b[1]}, want: []string{"overlap"}},
		"reset before":                      {early: pg, events: []event{fault(1, 15, "reset"), a[0], b[0], a[1], b[1]}, want: []string{"overlap"}},
		"evicted by a crash":                {early: pg, events: []event{fault(0, 15, "crash server 1"), a[0], b[0], a[1], b[1]}},
		"healed before":                     {early: pg, events: []event{fault(0, 5, "crash server 1"), {Kind: kindHeal, At: 15}, a[0], b[0], a[1], b[1]}, want: []string{"overlap"}},
		"a pause evicts nobody":             {early: pg, events: []event{a[0], fault(0, 30, "pause server 1"), b[0], a[1], b[1]}, want: []string{"overlap"}},
		"the same token":                    {events: append(lock(1, 5, 10, 20, 30), lock(2, 5, 15, 30, 40)...), want: []string{"token"}},
		"a smaller token later":             {events: append(lock(1, 5, 10, 20, 30), lock(2, 4, 25, 30, 40)...), want: []string{"token"}},
		"a smaller token, but asked before": {events: append(lock(1, 5, 10, 20, 30), lock(2, 4, 15, 30, 40)...)},
		"a late write is refused": {refused: 1, events: []event{
			a[0], use(kindLook, 1, 5, 21, 0), lock(2, 6, 15, 70, 90)[0], use(kindLook, 2, 6, 71, 0),
			use(kindWrite, 1, 5, 72, 0), use(kindWrite, 2, 6, 73, 0), a[1], lock(2, 6, 15, 70, 90)[1],
		}},
		"a write over what was not seen": {events: []event{
			a[0], b[0], use(kindLook, 1, 5, 51, 0), use(kindLook, 2, 6, 52, 0), use(kindWrite, 2, 6, 53, 7),
		}, want: []string{"guard"}},
		"both sure, one overwritten": {events: []event{
			a[0], lock(2, 6, 15, 60, 90)[0], use(kindWrite, 1, 5, 51, 0), use(kindWrite, 2, 6, 53, 1), sure(a[1]), sure(lock(2, 6, 15, 60, 90)[1]),
		}, want: []string{"register"}},
		"one is not sure, and overwritten": {events: []event{
			a[0], lock(2, 6, 15, 60, 90)[0], use(kindWrite, 1, 5, 51, 0), use(kindWrite, 2, 6, 53, 1), a[1], sure(lock(2, 6, 15, 60, 90)[1]),
		}},
	} {
		j := newJudge(locker.Capabilities{EarlyFree: c.early}, time.Second, false)
		var got []string
		for _, e := range c.events {
			if _, v := j.hear(e); v != nil {
				got = append(got, v.Kind)
			}
		}
		if !slices.Equal(got, c.want) || j.refused != c.refused {
			t.Errorf("%s: %q, want %q; %d writes refused, want %d", name, got, c.want, j.refused, c.refused)
		}
	}
}

// TestJudgeKilled: who is killed believes until then, or until its deadline.
func TestJudgeKilled(t *testing.T) {
	for killed, want := range map[time.Duration]bool{20: false, 40: false, 70: true, 999: true} {
		j := newJudge(locker.Capabilities{}, time.Second, false)
		for _, e := range append(lock(1, 5, 10, 20, 0)[:1], lock(2, 6, 15, 50, 200)...) {
			if _, v := j.hear(e); v != nil {
				t.Fatal(v)
			}
		}
		if v := j.gone(1, 1, killed); (v != nil) != want {
			t.Errorf("killed at %v: %v", killed, v)
		}
	}
}

// TestWaiting: everybody and every key needs a lock in time.
func TestWaiting(t *testing.T) {
	const bound = 10 * time.Second
	heal, ready := event{Kind: kindHeal, At: 1}, func(worker int, at time.Duration) event {
		return event{Kind: kindReady, Worker: worker, At: at}
	}
	got := func(worker int, key string, at time.Duration) event {
		return event{Kind: kindAcquired, Worker: worker, Lock: worker, Key: key, Token: uint64(at), Call: at, At: at}
	}
	for name, c := range map[string]struct {
		events []event
		at     time.Duration
		who    string
		late   bool
	}{
		"nobody yet":            {[]event{heal, ready(1, 2), ready(2, 2)}, 3, "worker 1", false},
		"a worker is missing":   {[]event{heal, ready(1, 2), ready(2, 2), got(1, "a", 3), got(1, "b", 4)}, 5, "worker 2", false},
		"a key is missing":      {[]event{heal, ready(1, 2), ready(2, 2), got(1, "a", 3), got(2, "a", 4)}, 5, "b", false},
		"nothing is missing":    {[]event{heal, ready(1, 2), ready(2, 2), got(1, "a", 3), got(2, "b", 4)}, 5, "", false},
		"that was before":       {[]event{ready(1, 0), ready(2, 0), got(1, "a", 1), {Kind: kindHeal, At: 2}, got(2, "b", 4)}, 5, "worker 1", false},
		"a key is late":         {[]event{heal, ready(1, 2), ready(2, 2), got(1, "a", 3), got(2, "a", 4)}, 2 * bound, "b", true},
		"it came too late":      {[]event{heal, ready(1, 2), ready(2, 2), got(1, "a", 3), got(2, "b", bound+3)}, bound + 4, "worker 2", true},
		"still beginning":       {[]event{heal, ready(1, 2), got(1, "a", 3), got(1, "b", 4)}, bound + 3*time.Second, "worker 2", false},
		"it has never begun":    {[]event{heal, ready(1, 2), got(1, "a", 3), got(1, "b", 4)}, bound + 2*startTimeout, "worker 2", true},
		"killed and not begun":  {[]event{ready(1, 0), ready(2, 0), {Kind: kindEnded, Worker: 2}, heal, got(1, "a", 3), got(1, "b", 4)}, bound + 3*time.Second, "worker 2", false},
		"it began late as well": {[]event{heal, ready(1, 2), ready(2, 5*time.Second), got(1, "a", 3), got(2, "b", bound+4)}, bound + 5, "b", true},
	} {
		j := newJudge(locker.Capabilities{}, time.Second, false)
		for _, e := range c.events {
			_, _ = j.hear(e) // tokens are not what this is about
		}
		if who, late, _ := j.waiting([]string{"a", "b"}, 2, bound, c.at); who != c.who || late != c.late {
			t.Errorf("%s: %s, want %s", name, fmt.Sprint(who, late), fmt.Sprint(c.who, c.late))
		}
	}
}
