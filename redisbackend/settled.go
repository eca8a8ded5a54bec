package redisbackend

import (
	"hash/maphash"
	"sync"
	"time"
)

// settled remembers, of locks released lately, the request that held it, if no copy of any of its requests can still be on
// its way: each was sent once and answered. The next grant to this Locker then needs no tombstone of it, which is half of
// what a lock costs that one program takes again and again. Forgetting one costs a tombstone.
type settled struct {
	mu    sync.Mutex
	seed  maphash.Seed
	slots []struct{ key, id string } // by the key's hash
	until time.Time                  // before, nothing is settled
}

const settledSlots = 128

func newSettled() settled {
	return settled{seed: maphash.MakeSeed(), slots: make([]struct{ key, id string }, settledSlots)}
}

// suspend notes that a request had no answer. A copy of it may be on its way for as long as tombstones last, and it may be
// made once more under its old ID, so that nobody can tell from one call alone.
func (s *settled) suspend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = time.Now().Add(tombstoneLife)
}

func (s *settled) put(key, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return
	}
	slot := &s.slots[maphash.String(s.seed, key)%settledSlots]
	slot.key, slot.id = key, id
}

func (s *settled) get(key string) (id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot := s.slots[maphash.String(s.seed, key)%settledSlots]; slot.key == key {
		return slot.id
	}
	return ""
}
