package redisbackend

// SlotOf is for tests that choose the server of a lock.
var SlotOf = slotOf
