package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

func system() Clock {
	if _, ok := read(unix.CLOCK_BOOTTIME); !ok {
		return monotonic{epoch: time.Now()}
	}
	return boottime{}
}

type boottime struct{}

// Now reads the boot clock before and after the monotonic one, and again if too much time lies between: a goroutine
// that was preempted there would take its own delay for a suspend.
func (boottime) Now() Reading {
	var r Reading
	for range 8 {
		before, _ := read(unix.CLOCK_BOOTTIME)
		r = Reading{Mono: time.Now(), Boot: before}
		if after, _ := read(unix.CLOCK_BOOTTIME); after-before < narrow {
			break
		}
	}
	return r
}

// inBubble recognises the fake time of testing/synctest: only there is time.Now not between two readings of the
// system's own wall clock. A step of the wall clock could look the same once, but not three times in a row.
func inBubble() bool {
	for range 3 {
		before, ok := read(unix.CLOCK_REALTIME)
		now := time.Duration(time.Now().UnixNano())
		after, _ := read(unix.CLOCK_REALTIME)
		if !ok || before <= now && now <= after {
			return false
		}
	}
	return true
}

func read(id int32) (time.Duration, bool) {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}
