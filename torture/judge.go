package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/fec20105/locker"
)

// judge hears every event as it comes, and says what contradicts what a lock promises.
type judge struct {
	caps      locker.Capabilities
	memory    time.Duration // how long what is over can still meet something new: as long as a process is stopped, and more
	guard     locker.Guard
	keys      map[string]*keyState
	open      map[hold]*belief
	evictions []eviction

	locks, lost, writes, refused, overwritten, excused int
}

// hold names one lock of one life of a worker.
type hold struct{ worker, life, lock int }

// belief is the time in which the work relied on one lock.
type belief struct {
	hold
	key              string
	token            uint64
	call, from, to   time.Duration // asked for, from then on, and until then
	until            time.Duration // the deadline that it has told last
	plain, plainBase int           // the version that it wrote to the plain register, and the one that it had read
	sure             bool          // that write was surely made in this time
}

// keyState is what is known of one key.
type keyState struct {
	recent         []*belief // those that are not forgotten, in the order of their grants' news
	token          uint64    // the greatest of the forgotten
	guarded, plain int       // the versions of the registers
}

// eviction is a time in which locks may have been freed early, as EarlyFree says: of one worker, or of all (0).
type eviction struct {
	worker   int
	from, to time.Duration
}

// violation is a promise that was broken.
type violation struct {
	Kind     string // "overlap", "token", "guard", "register", "progress", "leak", "crash"
	Text     string
	Key      string // "" if it is not about one
	From, To time.Duration
	Holds    []hold // whose locks it is about
}

func (v *violation) Error() string { return v.Kind + ": " + v.Text }

func newJudge(caps locker.Capabilities, ttl time.Duration) *judge {
	return &judge{caps: caps, memory: 20 * ttl, keys: make(map[string]*keyState), open: make(map[hold]*belief)}
}

const always = time.Duration(1<<63 - 1)

// hear takes an event. The answer is for looks and writes.
func (j *judge) hear(e event) (answer order, v *violation) {
	b := j.open[hold{e.Worker, e.Life, e.Lock}]
	switch {
	case e.Kind == kindAcquired:
		return answer, j.acquired(e)
	case e.Kind == kindFault && e.Text == "link: reset" && j.caps.EarlyFree&locker.EarlyFreeDisconnect != 0:
		j.evicts(e.Worker, e.At, e.At)
	case b == nil:
	case e.Kind == kindLook || e.Kind == kindWrite:
		answer = order{Do: doAnswer, Ask: e.Ask}
		key := j.keys[e.Key]
		err := j.guard.Do(e.Key, b.token, func() error {
			if e.Kind == kindWrite {
				v = j.write(key, b, e)
			}
			return nil
		})
		answer.Refused = err != nil
		if e.Kind == kindWrite {
			if answer.Refused {
				j.refused++
			}
			key.plain++
			b.plain, b.plainBase = key.plain, e.Base.Plain
			if b.plainBase != key.plain-1 {
				j.overwritten++
			}
		}
		answer.Base = bases{Guarded: key.guarded, Plain: key.plain}
	case e.Kind == kindBelieved:
		b.to, b.until, b.sure = e.At, e.Until, e.Sure
		if e.Text != "" {
			j.lost++
		}
		return answer, j.ended(b)
	}
	return answer, v
}

// gone ends the beliefs of a process that is gone, which was alive until then.
func (j *judge) gone(worker, life int, at time.Duration) (v *violation) {
	for h, b := range j.open {
		if h.worker == worker && h.life == life {
			b.to = min(at, b.until)
			if found := j.ended(b); v == nil {
				v = found
			}
		}
	}
	return v
}

// write is a write that the guard lets pass.
func (j *judge) write(key *keyState, b *belief, e event) (v *violation) {
	if e.Base.Guarded != key.guarded {
		v = &violation{
			Kind: "guard", Key: e.Key, From: b.from, To: e.At, Holds: []hold{b.hold},
			Text: fmt.Sprintf("the guard of %s let worker %d (token %d) write version %d over version %d", e.Key, e.Worker, b.token, e.Base.Guarded+1, key.guarded),
		}
	}
	key.guarded++
	j.writes++
	return v
}

// acquired begins a belief. A lock that was asked for after another was granted has the greater token.
func (j *judge) acquired(e event) *violation {
	j.locks++
	b := &belief{hold: hold{e.Worker, e.Life, e.Lock}, key: e.Key, token: e.Token, call: e.Call, from: e.At, to: always, until: e.Until}
	key := j.keys[e.Key]
	if key == nil {
		key = new(keyState)
		j.keys[e.Key] = key
	}
	j.forget(key, e.At)
	for _, a := range key.recent {
		early, late := a, b
		if b.from <= a.call {
			early, late = b, a
		}
		if early.token == late.token || early.from <= late.call && early.token > late.token {
			return &violation{
				Kind: "token", Key: b.key, From: early.from, To: late.from, Holds: []hold{early.hold, late.hold},
				Text: fmt.Sprintf("of %s worker %d got token %d, and later worker %d got token %d", b.key, early.worker, early.token, late.worker, late.token),
			}
		}
	}
	if b.token <= key.token {
		return &violation{
			Kind: "token", Key: b.key, From: b.call, To: b.from, Holds: []hold{b.hold},
			Text: fmt.Sprintf("of %s worker %d got token %d, long after somebody had got %d", b.key, b.worker, b.token, key.token),
		}
	}
	key.recent = append(key.recent, b)
	j.open[b.hold] = b
	return nil
}

// forget drops what can meet nothing new.
func (j *judge) forget(key *keyState, at time.Duration) {
	if len(key.recent) == 0 || key.recent[0].from > at-2*j.memory {
		return
	}
	key.recent = slices.DeleteFunc(key.recent, func(b *belief) bool {
		old := b.to < at-j.memory
		if old {
			key.token = max(key.token, b.token)
		}
		return old
	})
	j.evictions = slices.DeleteFunc(j.evictions, func(e eviction) bool { return e.to < at-2*j.memory })
}

// ended compares a belief that is over with all others that are: who believed at the same time, and who overwrote what
// another had surely written under the lock.
func (j *judge) ended(b *belief) *violation {
	delete(j.open, b.hold)
	for _, a := range j.keys[b.key].recent {
		if a == b || a.to == always || j.open[a.hold] != nil {
			continue
		}
		early, late := a, b
		if b.from < a.from {
			early, late = b, a
		}
		overlap := min(early.to, late.to) - late.from
		lostUpdate := a.sure && b.sure && (a.plainBase < b.plain && b.plain < a.plain || b.plainBase < a.plain && a.plain < b.plain)
		v := &violation{Key: b.key, From: early.from, To: max(early.to, late.to), Holds: []hold{early.hold, late.hold}}
		switch {
		case overlap > 0:
			v.Kind = "overlap"
			v.Text = fmt.Sprintf("two believed to hold %s for %v: worker %d (token %d) until %v after the start, and worker %d (token %d) from %v on",
				b.key, overlap, early.worker, early.token, seconds(early.to), late.worker, late.token, seconds(late.from))
		case lostUpdate:
			v.Kind = "register"
			v.Text = fmt.Sprintf("workers %d (token %d) and %d (token %d) wrote to the register of %s under the lock, and one update is lost",
				early.worker, early.token, late.worker, late.token, b.key)
		default:
			continue
		}
		if !j.evicted(early, late.from) {
			return v
		}
		j.excused++
	}
	return nil
}

// evicts notes that locks may be freed early.
func (j *judge) evicts(worker int, from, to time.Duration) {
	j.evictions = append(j.evictions, eviction{worker: worker, from: from, to: to})
}

// healed ends the evictions that had no end yet.
func (j *judge) healed(at time.Duration) {
	for i := range j.evictions {
		j.evictions[i].to = min(j.evictions[i].to, at)
	}
}

// evicted tells whether a lock may have been freed early before somebody else had it.
func (j *judge) evicted(b *belief, before time.Duration) bool {
	return slices.ContainsFunc(j.evictions, func(e eviction) bool {
		return (e.worker == 0 || e.worker == b.worker) && e.to >= b.from && e.from <= before
	})
}

// seconds is a moment as people read it.
func seconds(d time.Duration) string { return fmt.Sprintf("%.6f s", d.Seconds()) }
