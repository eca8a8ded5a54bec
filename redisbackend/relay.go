package redisbackend

import (
	"hash/maphash"
	"sync"
)

// relay learns which locks the goroutines of this process hand to each other: while one releases such a lock, the next
// asks for it already. Both calls then go to the server together, the release first, and the lock changes hands in one
// round trip instead of two. To guess wrong costs one look at what else is ready to run.
type relay struct {
	mu    sync.Mutex
	seed  maphash.Seed
	slots [relaySlots]struct { // by the key's hash
		key              string
		release, relayed bool // a release is on its way; during the latest one the lock was asked for
	}
}

const relaySlots = 128

// releases notes that a release is on its way, and tells whether a request for the same lock is likely to follow at once.
func (r *relay) releases(key string) (relayed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	slot := &r.slots[maphash.String(r.seed, key)%relaySlots]
	relayed = slot.key == key && slot.relayed
	slot.key, slot.release, slot.relayed = key, true, false
	return relayed
}

// released notes that it was answered.
func (r *relay) released(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slot := &r.slots[maphash.String(r.seed, key)%relaySlots]; slot.key == key {
		slot.release = false
	}
}

// asks notes a request for a lock.
func (r *relay) asks(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slot := &r.slots[maphash.String(r.seed, key)%relaySlots]; slot.key == key && slot.release {
		slot.relayed = true
	}
}
