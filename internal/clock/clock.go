// Package clock reads elapsed time in a way that counts suspend.
//
// Go's monotonic clock is CLOCK_MONOTONIC on Linux, which stands still while the machine is suspended
// (https://go.dev/issue/24595). A lock's server does not stand still, so a client that trusts that clock wakes up
// and believes in locks that were given away long ago. CLOCK_BOOTTIME goes on; but it is no time.Time and no timer
// follows it. So both are read, and what has elapsed is the larger of the two.
package clock

import "time"

// Reading is one look at both clocks.
type Reading struct {
	Mono time.Time     // with its monotonic reading
	Boot time.Duration // since some fixed moment, suspend included
}

// Clock makes readings.
type Clock interface {
	Now() Reading
}

// tolerance is how far the clocks of two readings may seem to part without any suspend: each reading looks at them one
// after the other, at most narrow apart.
const (
	narrow    = time.Millisecond
	tolerance = 2 * narrow
)

// Since tells how much time has passed between start and r, where start was read from the monotonic clock near the
// time of from. A suspend between from and start counts although it was before start: that errs on the side of
// more elapsed time, which for a lease is the safe one.
func (r Reading) Since(start time.Time, from Reading) time.Duration {
	mono := r.Mono.Sub(start)
	boot := r.Boot - from.Boot - start.Sub(from.Mono)
	return max(mono, boot)
}

// Parted tells whether the machine was suspended between from and r.
func (r Reading) Parted(from Reading) bool {
	return r.Boot-from.Boot-r.Mono.Sub(from.Mono) > tolerance
}

// System returns the machine's clocks. Called inside a testing/synctest bubble it returns the bubble's clock alone:
// time.Now is fake there and the boot clock is not.
func System() Clock {
	if inBubble() {
		return monotonic{epoch: time.Now()}
	}
	return system()
}

// monotonic is a clock for which suspend does not exist.
type monotonic struct{ epoch time.Time }

func (m monotonic) Now() Reading {
	now := time.Now()
	return Reading{Mono: now, Boot: now.Sub(m.epoch)}
}
