package conformance

import (
	"strconv"
	"time"

	"github.com/fec20105/locker"
)

// hygieneRows has what the end of each row does not check anyway: that no connection and no goroutine is left.
var hygieneRows = []row{
	{
		name: "dropped-locker",
		clause: "What a Locker still holds when it is closed is left to expire. Where EarlyFree has disconnect it is " +
			"freed at once, and its holder is told ReasonClosed.",
		run: droppedLocker,
	},
}

func droppedLocker(t *trial) {
	const keys = 10
	observer, _ := t.open()
	leases := make([]locker.Lease, keys)
	told := make(chan locker.Reason, 2*keys)
	l, _ := t.open()
	t.parallel(keys, func(i int) {
		leases[i] = t.acquire(l, t.key(strconv.Itoa(i)), func(req *locker.Request) {
			req.Lost = func(r locker.Reason) { told <- r }
		})
	})
	if err := l.Close(); err != nil {
		t.Errorf("closing a Locker that holds locks: %v", err)
	}
	if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 {
		t.parallel(keys, func(i int) { t.expires(observer, leases[i]) })
		return
	}
	closed := time.Now()
	t.parallel(keys, func(i int) {
		lease, _ := t.freeWithin(observer, leases[i].Key, closed, t.soon())
		t.release(observer, lease)
	})
	for range keys {
		if reason := receive(t, told, t.soon(), "Close tells the holder of a lock that it frees"); reason != locker.ReasonClosed {
			t.Errorf("a holder was told %v by Close, want %v", reason, locker.ReasonClosed)
		}
	}
}
