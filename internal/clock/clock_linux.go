package clock

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func system() Clock {
	if _, ok := read(unix.CLOCK_BOOTTIME); !ok {
		return monotonic{epoch: time.Now()}
	}
	return boottime{}
}

type boottime struct{}

// Now reads the boot clock and then the monotonic one, and again if too much time lies between: a goroutine that was
// preempted there would take its own delay for a suspend. A suspend of the machine between the two goes unseen, and need
// not be seen: in that order it counts as one after the reading, which for the start of a lease is the safe side.
func (boottime) Now() Reading {
	var r Reading
	for range 8 {
		before := time.Now()
		boot, _ := read(unix.CLOCK_BOOTTIME)
		r = Reading{Mono: time.Now(), Boot: boot}
		if r.Mono.Sub(before) < narrow {
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
	// It never blocks, so the scheduler need not know of it.
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}
