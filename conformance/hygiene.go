package conformance

import (
	"fmt"
	"runtime/pprof"
	"strings"
	"time"
)

// labelKey is the profiler label that a row's goroutines carry.
const labelKey = "conformance"

// screens is the most text of a goroutine dump that anybody reads.
const screens = 8000

// stacksOf are the stacks of the goroutines with a row's label. Each begins with the number of those that share it.
func stacksOf(id string) (stacks []string) {
	var profile strings.Builder
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		return []string{"no goroutine profile: " + err.Error()}
	}
	for stack := range strings.SplitSeq(profile.String(), "\n\n") {
		if strings.Contains(stack, `"`+labelKey+`":"`+id+`"`) {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// goroutineCount is the number of goroutines with a row's label.
func goroutineCount(id string) (count int) {
	for _, stack := range stacksOf(id) {
		n := 0
		for line := range strings.Lines(stack) { // the first may be the profile's own
			if _, err := fmt.Sscanf(line, "%d @", &n); err == nil {
				break
			}
		}
		count += n
	}
	return count
}

// goroutinesOf lists the stacks of the goroutines with a row's label, as much of them as fits on a screen or two.
func goroutinesOf(id string) string {
	text := strings.Join(stacksOf(id), "\n\n")
	if len(text) > screens {
		text = text[:screens] + "\n..."
	}
	return text
}

// leaked waits for a row's goroutines to end, and returns those that do not.
func leaked(id string, within time.Duration) string {
	deadline := time.Now().Add(within)
	pause := time.NewTimer(0)
	defer pause.Stop()
	for d := time.Millisecond; ; d = min(2*d, 100*time.Millisecond) {
		left := goroutinesOf(id)
		if left == "" || time.Now().After(deadline) {
			return left
		}
		pause.Reset(d)
		<-pause.C
	}
}
