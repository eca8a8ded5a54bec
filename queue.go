package locker

import (
	"container/list"
	"context"
	"sync"
)

// queue lets one goroutine of a Client at a time ask the server for a key. The others wait here, in the order in which they
// came, and cost the server nothing.
type queue struct {
	mu    sync.Mutex
	lines map[string]*line // only keys whose turn is taken
}

type line struct {
	waiting list.List // of chan struct{}, closed when the turn is passed to it
	holder  *Lock     // set while the turn is a lock that is held
}

// take waits for the key's turn, or returns ctx's error without it.
func (q *queue) take(ctx context.Context, key string) error {
	q.mu.Lock()
	l, taken := q.lines[key]
	if !taken {
		q.begin(key)
		q.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	place := l.waiting.PushBack(turn)
	q.mu.Unlock()

	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	select {
	case <-turn: // passed to us meanwhile: on to the next
		q.passLocked(key)
	default:
		l.waiting.Remove(place)
	}
	q.mu.Unlock()
	return ctx.Err()
}

// try takes the key's turn if it is free, else it tells which lock has it: nil if somebody is still asking.
func (q *queue) try(key string) (taken bool, holder *Lock) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l, ok := q.lines[key]; ok {
		return false, l.holder
	}
	q.begin(key)
	return true, nil
}

func (q *queue) begin(key string) {
	if q.lines == nil {
		q.lines = make(map[string]*line)
	}
	q.lines[key] = new(line)
}

// hold notes that the turn is l now, for try and holderOf.
func (q *queue) hold(l *Lock) {
	q.mu.Lock()
	q.lines[l.lease.Key].holder = l
	q.mu.Unlock()
}

// holderOf tells which lock of this Client holds the key, or nil.
func (q *queue) holderOf(key string) *Lock {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l, ok := q.lines[key]; ok {
		return l.holder
	}
	return nil
}

// pass gives the turn to the next in line.
func (q *queue) pass(key string) {
	q.mu.Lock()
	q.passLocked(key)
	q.mu.Unlock()
}

func (q *queue) passLocked(key string) {
	l := q.lines[key]
	l.holder = nil
	if first := l.waiting.Front(); first != nil {
		close(l.waiting.Remove(first).(chan struct{}))
		return
	}
	delete(q.lines, key)
}
