package clock

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestSinceIsTheLargerOfBothClocks(t *testing.T) {
	base := time.Now()
	from := Reading{Mono: base, Boot: 100 * time.Second}
	start := base.Add(time.Second)
	for _, c := range []struct {
		name       string
		mono, boot time.Duration // since from
		want       time.Duration
	}{
		{"awake", 5 * time.Second, 5 * time.Second, 4 * time.Second},
		{"suspended for a minute", 5 * time.Second, 65 * time.Second, 64 * time.Second},
		{"boot clock read a little early", 5 * time.Second, 5*time.Second - narrow/2, 4 * time.Second},
	} {
		now := Reading{Mono: base.Add(c.mono), Boot: from.Boot + c.boot}
		if got := now.Since(start, from); got != c.want {
			t.Errorf("%s: Since = %v, want %v", c.name, got, c.want)
		}
		if got, want := now.Parted(from), c.boot-c.mono > tolerance; got != want {
			t.Errorf("%s: Parted = %v, want %v", c.name, got, want)
		}
	}
}

func TestSystemClocksDoNotPartWhileAwake(t *testing.T) {
	c := System()
	from := c.Now()
	for range 10_000 {
		if now := c.Now(); now.Parted(from) {
			t.Fatalf("parted without a suspend: %+v, then %+v", from, now)
		}
	}
}

func TestBubbleLeavesBootTimeOut(t *testing.T) {
	if inBubble() {
		t.Fatal("inBubble outside of a bubble")
	}
	synctest.Test(t, func(t *testing.T) {
		c := System()
		from := c.Now()
		time.Sleep(time.Hour) // fake
		if got := c.Now().Since(from.Mono, from); got != time.Hour {
			t.Errorf("an hour in a bubble took %v", got)
		}
		if c.Now().Parted(from) {
			t.Error("the clocks parted in a bubble")
		}
	})
}
