package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fec20105/locker"
)

// judge hears every event as it comes, and says what contradicts what is promised of locks.
type judge struct {
	caps    locker.Capabilities
	cluster bool          // of servers, one of which may take over from another
	memory  time.Duration // how long what is over can still meet something new: as long as a process is stopped, and more
	guard   locker.Guard

	keys      map[string]*keyState
	open      map[hold]*belief
	evictions []eviction

	// Of progress: when everything works again (0: it does not yet), when each worker that lives had reached its server, and the
	// first lock since then of each key and of each worker.
	healed time.Duration
	ready  map[string]time.Duration
	first  map[string]time.Duration

	locks, lost, writes, refused, overwritten, excused int
}

// hold names one lock of one life of a worker.
type hold struct{ worker, life, lock int }

// belief is the time in which the work relied on one lock.
type belief struct {
	hold
	key            string
	token          uint64
	call, from, to time.Duration // asked for, from then on, and until then
	until          time.Duration // the deadline that it has told last
	wrote, over    int           // the version that it has written to the plain register, and the one that it had read
	sure           bool          // that write was surely made in this time
}

// keyState is what is known of one key.
type keyState struct {
	recent []*belief // that are not forgotten
	token  uint64    // the greatest that is forgotten
	versions
}

// eviction is a time in which locks of a worker, or of all (0), may have been freed early.
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

func newJudge(caps locker.Capabilities, ttl time.Duration, cluster bool) *judge {
	return &judge{caps: caps, cluster: cluster, memory: 20 * ttl, keys: make(map[string]*keyState), open: make(map[hold]*belief), ready: make(map[string]time.Duration)}
}

const always = time.Duration(1<<63 - 1)

// hear takes an event. The answer is for looks and writes.
func (j *judge) hear(e event) (answer order, v *violation) {
	b := j.open[hold{e.Worker, e.Life, e.Lock}]
	switch {
	case e.Kind == kindAcquired:
		v = j.acquired(e)
	case e.Kind == kindFault:
		j.fault(e)
	case e.Kind == kindHeal:
		for i := range j.evictions {
			j.evictions[i].to = min(j.evictions[i].to, e.At)
		}
		j.healed, j.first = e.At, make(map[string]time.Duration)
	case e.Kind == kindReady:
		j.ready[workerName(e.Worker)] = e.At
	case e.Kind == kindEnded:
		delete(j.ready, workerName(e.Worker))
	case b == nil:
	case e.Kind == kindLook || e.Kind == kindWrite:
		return j.register(b, e)
	case e.Kind == kindBelieved:
		b.to, b.until, b.sure = e.At, e.Until, e.Sure
		if e.Text != "" {
			j.lost++
		}
		v = j.ended(b)
	}
	return answer, v
}

// fault notes that locks may be freed early, where EarlyFree says so: those of a worker whose connections are reset, and all
// from a fault of the servers until everything works again.
func (j *judge) fault(e event) {
	names := func(what locker.EarlyFree) bool { return j.caps.EarlyFree&what != 0 }
	fault, _, _ := strings.Cut(e.Text, " ")
	switch {
	case e.Worker > 0 && fault == "reset" && names(locker.EarlyFreeDisconnect):
		j.evictions = append(j.evictions, eviction{e.Worker, e.At, e.At})
	case (fault == "crash" || fault == "restart") && names(locker.EarlyFreeRestart),
		(fault == "crash" || fault == "restart" || fault == "pause") && j.cluster && names(locker.EarlyFreeFailover):
		j.evictions = append(j.evictions, eviction{0, e.At, always})
	}
}

// acquired begins a belief. A lock that was asked for after another was granted has the greater token.
func (j *judge) acquired(e event) *violation {
	j.locks++
	for _, name := range []string{e.Key, workerName(e.Worker)} {
		if j.first[name] == 0 && j.healed > 0 && e.At >= j.healed {
			j.first[name] = e.At
		}
	}
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
			return about("token", early, late, "of %s worker %d got token %d, and later worker %d got token %d",
				b.key, early.worker, early.token, late.worker, late.token)
		}
	}
	if b.token <= key.token {
		return about("token", b, b, "of %s worker %d got token %d, long after somebody had got %d", b.key, b.worker, b.token, key.token)
	}
	key.recent = append(key.recent, b)
	j.open[b.hold] = b
	return nil
}

func workerName(i int) string { return fmt.Sprint("worker ", i) }

// startTimeout is how long a process may take to begin.
const startTimeout = 20 * time.Second

// waiting names the first of the keys and workers that had no lock within bound since everything works again, or since the
// process had begun; late tells that it is too late for one. At the end it answers how long the slowest took.
func (j *judge) waiting(keys []string, workers int, bound, at time.Duration) (who string, late bool, slowest time.Duration) {
	const news = time.Second // on its way
	look := func(name string, since time.Duration) {
		first := j.first[name]
		slowest = max(slowest, first-since)
		if missing := first == 0; who == "" && missing || !late && (first > since+bound || missing && at > since+bound+news) {
			who, late = name, !missing || at > since+bound+news
		}
	}
	began := always
	for i := range workers {
		name := workerName(i + 1)
		since := max(j.healed, j.ready[name])
		if j.ready[name] == 0 {
			since = j.healed + startTimeout
		}
		began = min(began, since)
		look(name, since)
	}
	for _, key := range keys {
		look(key, began)
	}
	return who, late, slowest
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

// register lets the work look at both registers of a key, or write to them. Behind the guard a look counts as much as a write:
// it refuses everybody with a smaller token from then on, so nothing is written over what a look has not shown.
func (j *judge) register(b *belief, e event) (answer order, v *violation) {
	key := j.keys[e.Key]
	answer = order{Do: doAnswer, Ask: e.Ask}
	answer.Refused = j.guard.Do(e.Key, b.token, func() error {
		if e.Kind != kindWrite {
			return nil
		}
		if e.Seen.Guarded != key.Guarded {
			v = about("guard", b, b, "the guard of %s let worker %d (token %d) write version %d over version %d, which it had not seen",
				e.Key, e.Worker, b.token, e.Seen.Guarded+1, key.Guarded)
			v.To = e.At
		}
		key.Guarded++
		j.writes++
		return nil
	}) != nil
	if e.Kind == kindWrite {
		if answer.Refused {
			j.refused++
		}
		if e.Seen.Plain != key.Plain {
			j.overwritten++
		}
		key.Plain++
		b.wrote, b.over = key.Plain, e.Seen.Plain
	}
	answer.Seen = key.versions
	return answer, v
}

// gone ends the beliefs of a process that is gone, and lived until then.
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

// ended compares a belief that is over with all others that are: who believed at the same time, and who wrote over what another
// had surely written under the lock.
func (j *judge) ended(b *belief) *violation {
	delete(j.open, b.hold)
	for _, a := range j.keys[b.key].recent {
		if a == b || j.open[a.hold] != nil {
			continue
		}
		early, late := a, b
		if b.from < a.from {
			early, late = b, a
		}
		var v *violation
		between := func(a, b *belief) bool { return b.over < a.wrote && a.wrote < b.wrote }
		if overlap := min(early.to, late.to) - late.from; overlap > 0 {
			v = about("overlap", early, late, "two believed to hold %s for %v: worker %d (token %d) until %s after the start, and worker %d (token %d) from %s on",
				b.key, overlap, early.worker, early.token, seconds(early.to), late.worker, late.token, seconds(late.from))
		} else if a.sure && b.sure && (between(a, b) || between(b, a)) {
			v = about("register", early, late, "workers %d (token %d) and %d (token %d) wrote to the register of %s under the lock, and one update is lost",
				early.worker, early.token, late.worker, late.token, b.key)
		}
		switch {
		case v == nil:
		case !j.evicted(early, late.from):
			return v
		default:
			j.excused++
		}
	}
	return nil
}

// evicted tells whether a lock may have been freed early before somebody else had it.
func (j *judge) evicted(b *belief, before time.Duration) bool {
	return slices.ContainsFunc(j.evictions, func(e eviction) bool {
		return (e.worker == 0 || e.worker == b.worker) && e.to >= b.from && e.from <= before
	})
}

// about is a violation that two locks of a key are about, or one.
func about(kind string, early, late *belief, format string, args ...any) *violation {
	v := &violation{Kind: kind, Key: late.key, From: early.from, To: late.from, Holds: []hold{early.hold, late.hold}, Text: fmt.Sprintf(format, args...)}
	for _, b := range []*belief{early, late} {
		if b.to != always {
			v.To = max(v.To, b.to)
		}
	}
	return v
}
