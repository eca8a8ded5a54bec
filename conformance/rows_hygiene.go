package conformance

import (
	"strconv"

	"github.com/fec20105/locker"
)

// hygieneRows has what the end of each row does not check anyway: that no connection and no goroutine is left.
var hygieneRows = []row{
	{
		name:   "dropped-locker",
		clause: "What a Locker still holds when it is closed is left to expire: its keys are free when their TTL is over.",
		run:    droppedLocker,
	},
}

func droppedLocker(t *trial) {
	const keys = 10
	observer, _ := t.open()
	leases := make([]locker.Lease, keys)
	l, _ := t.open()
	t.parallel(keys, func(i int) { leases[i] = t.acquire(l, t.key(strconv.Itoa(i))) })
	if err := l.Close(); err != nil {
		t.Errorf("closing a Locker that holds locks: %v", err)
	}
	t.parallel(keys, func(i int) {
		if t.caps.EarlyFree&locker.EarlyFreeDisconnect == 0 {
			t.expires(observer, leases[i])
			return
		}
		lease, _ := t.freeWithin(observer, leases[i].Key, leases[i].Start, t.freed())
		t.release(observer, lease)
	})
}
