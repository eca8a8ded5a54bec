package redisbackend

import (
	byTime "container/heap"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// This file is a model of Redlock's rules for tokens and votes, small enough to be run on thousands of seeds: five servers,
// some clients, and a network that delays, loses and repeats. One goroutine plays a run, so that a seed always gives the same
// run. The rules here are those of scripts/redlock_*.lua and redlock*.go, rule by rule under the same names; each rule can be
// left out, and the model must then find the fault that the rule is there for.

var modelSeeds = flag.Int("model", 200, "how many seeds TestRedlockModel plays; make model plays 20,000")

// Times of the model are about microseconds; only their proportions matter.
const (
	modelServers    = 5
	modelQuorum     = modelServers/2 + 1
	modelClients    = 4
	modelTTL        = 1000
	modelQuarantine = 1500 // longer than the TTL, and than the clocks of the servers differ
	modelSkew       = 1200
	modelLife       = 24000
)

// modelRules says what differs from the real protocol. The zero value is the real one.
type modelRules struct {
	noWriteBack   bool // the greatest token of the votes is used without telling the servers
	notStrict     bool // a server takes a token that it has seen already
	plainCounters bool // a server that lost its memory begins at zero, and tokens are not times
	noFloor       bool // a server that lost its memory takes whatever is proposed, after its quarantine
	noQuarantine  bool // a server that lost its memory votes at once
}

// modelServer is one server's memory.
type modelServer struct {
	clock int // ahead of true time by
	born  int // by its own clock: since when it remembers everything
	token int // 0 if it knows nothing of the lock
	owner int // 0 if nobody
	until int // by its own clock
	gone  map[int]bool
}

type modelGrant struct {
	owner, token      int
	began, won, ended int // in true time; ended is when nobody believes in it any more
}

type modelRun struct {
	rules    modelRules
	random   *rand.Rand
	now      int
	events   modelEvents
	sequence int
	servers  [modelServers]modelServer
	owners   int
	grants   []modelGrant
	heedless bool // clients of this run do not look at the time at all
	losses   int  // of a hundred messages
}

// playModel plays one seed, and tells which promises were broken.
func playModel(seed uint64, rules modelRules) (*modelRun, []string) {
	r := &modelRun{rules: rules, random: rand.New(rand.NewPCG(seed, 1))}
	r.heedless = r.random.IntN(3) == 0
	r.losses = []int{2, 10, 25}[r.random.IntN(3)]
	for i := range r.servers {
		r.servers[i] = modelServer{clock: r.random.IntN(modelSkew), born: -2 * modelQuarantine, gone: map[int]bool{}}
	}
	for range modelClients {
		r.in(r.random.IntN(500), r.lock)
	}
	r.in(r.random.IntN(3000), r.wipe)
	for len(r.events) > 0 {
		e := byTime.Pop(&r.events).(modelEvent)
		if r.now = e.at; r.now < modelLife {
			e.do()
		}
	}
	return r, r.broken()
}

// wipe takes a server's memory away, now and then of several at once.
func (r *modelRun) wipe() {
	for n := 1 + r.random.IntN(3)/2; n > 0; n-- {
		s := &r.servers[r.random.IntN(modelServers)]
		*s = modelServer{clock: s.clock, born: r.now + s.clock, gone: map[int]bool{}}
	}
	// No more than a minority within the quarantine: with more, locks are forgotten, though tokens still grow.
	r.in(modelQuarantine+modelSkew+r.random.IntN(3000), r.wipe)
}

// The rules of a server. Each is one script, and so happens at once.

func (r *modelRun) quarantined(s *modelServer) bool {
	return !r.rules.noQuarantine && !r.rules.plainCounters && r.now+s.clock < s.born+modelQuarantine
}

// vote grants the lock if it is free, and answers with a token of its own: the proposed one, or if it has seen that or a
// greater one, the next.
func (r *modelRun) vote(s *modelServer, owner, proposed int) (token int) {
	clock := r.now + s.clock
	if s.gone[owner] || r.quarantined(s) || s.owner != owner && s.until > clock {
		return 0
	}
	if s.owner == owner {
		if s.until <= clock {
			return 0
		}
		s.until = clock + modelTTL
		return s.token
	}
	floor := s.token
	if !r.rules.plainCounters && !r.rules.noFloor {
		if floor = max(floor, s.born); !r.rules.noQuarantine {
			floor = max(floor, s.born+modelQuarantine)
		}
	}
	if r.rules.notStrict {
		s.token = max(proposed, floor)
	} else {
		s.token = max(proposed, floor+1)
	}
	s.owner, s.until = owner, clock+modelTTL
	return s.token
}

// raise writes back the greatest token of the votes.
func (r *modelRun) raise(s *modelServer, owner, token int) int {
	if s.owner != owner || s.until <= r.now+s.clock {
		return 0
	}
	s.token = max(s.token, token)
	return s.token
}

func (r *modelRun) extend(s *modelServer, owner int) (held, clock int) {
	clock = r.now + s.clock
	if s.owner != owner || s.until <= clock {
		return 0, clock
	}
	s.until = clock + modelTTL
	return 1, clock
}

// repair gives a lock that most servers have extended to one that did not know it, until the moment before which the others
// do not free it.
func (r *modelRun) repair(s *modelServer, owner, token, until int) int {
	clock := r.now + s.clock
	if s.gone[owner] || r.quarantined(s) || s.until > clock || until <= clock {
		return 0
	}
	s.owner, s.token, s.until = owner, max(s.token, token), until
	return 1
}

func (r *modelRun) release(s *modelServer, owner int) {
	s.gone[owner] = true
	if s.owner == owner {
		s.until = 0
	}
}

// The rules of a client.

// median is what a client takes for the time: the median of the servers' clocks, as it last heard of them. One that was
// suspended, or never heard of them, is behind.
func (r *modelRun) median() int {
	var clocks []int
	for _, s := range r.servers {
		clocks = append(clocks, r.now+s.clock)
	}
	slices.Sort(clocks)
	behind := r.random.IntN(30)
	switch r.random.IntN(8) {
	case 0:
		behind = r.random.IntN(4000)
	case 1:
		behind = r.now + modelSkew
	}
	return max(clocks[len(clocks)/2]-behind, 1)
}

// lock takes the lock, holds it for a while, and goes on with that for ever.
func (r *modelRun) lock() {
	r.owners++
	g := &modelGrant{owner: r.owners, began: r.now}
	proposed := r.median()
	if r.rules.plainCounters {
		proposed = 1
	}
	votes, raised := map[int]int{}, map[int]int{} // tokens by server
	over, goal := false, 0
	var decide func()
	giveUp := func() {
		over = true
		r.undo(g.owner)
		r.in(50+r.random.IntN(300), r.lock)
	}
	decide = func() {
		if over || len(votes) < modelQuorum {
			return
		}
		greatest, equal := 0, map[int]int{}
		for _, token := range votes {
			greatest = max(greatest, token)
			equal[token]++
		}
		for token, n := range equal { // one of them at most
			if n >= modelQuorum && token >= goal {
				over, g.token = true, token
			}
		}
		if !over && r.rules.noWriteBack {
			over, g.token = true, greatest
		}
		if over {
			r.won(g)
			return
		}
		goal = greatest
		for i := range r.servers { // in order: a seed must give the same run
			if token, voted := votes[i]; voted && token < greatest && raised[i] < greatest {
				raised[i] = greatest
				r.ask(func() int { return r.raise(&r.servers[i], g.owner, greatest) }, func(token int) {
					if token > 0 && !over {
						votes[i] = token
						decide()
					}
				})
			}
		}
	}
	for i := range r.servers {
		r.ask(func() int { return r.vote(&r.servers[i], g.owner, proposed) }, func(token int) {
			if token != 0 && !over {
				votes[i] = max(votes[i], token)
				decide()
			}
		})
	}
	r.in(300+r.random.IntN(1500), func() {
		if !over {
			giveUp()
		}
	})
}

// won believes in a grant until the TTL is over, counted from before the first request.
func (r *modelRun) won(g *modelGrant) {
	g.won = r.now
	believed := g.began + modelTTL
	if g.won >= believed && !r.heedless {
		r.undo(g.owner)
		r.in(r.random.IntN(100), r.lock)
		return
	}
	g.ended = believed
	r.grants = append(r.grants, *g)
	index := len(r.grants) - 1
	done := r.now + r.random.IntN(2*modelTTL)
	var beat func()
	beat = func() {
		held := &r.grants[index]
		switch {
		case r.now >= done, r.now >= held.ended && !r.heedless:
			held.ended = min(held.ended, r.now)
			r.undo(held.owner)
			r.in(r.random.IntN(200), r.lock)
			return
		}
		r.renew(held.owner, held.token, func(start int) {
			if held := &r.grants[index]; r.now < held.ended && held.ended < start+modelTTL && r.now < done {
				held.ended = start + modelTTL
			}
		})
		r.in(min(modelTTL/3, max(done-r.now, 1), max(held.ended-r.now, 1)), beat)
	}
	beat()
}

// renew extends a lock, and when most servers still hold it repairs the others.
func (r *modelRun) renew(owner, token int, renewed func(start int)) {
	start, yes := r.now, map[int]bool{} // a server may answer twice
	type absent struct{ server, clock int }
	var missing []absent
	for i := range r.servers {
		clock := 0
		r.ask(func() (held int) { held, clock = r.extend(&r.servers[i], owner); return held + 1 }, func(answer int) {
			switch answer {
			case 1:
				missing = append(missing, absent{i, clock - (r.now - start)})
			case 2:
				yes[i] = true
			}
			if len(yes) >= modelQuorum {
				renewed(start)
				for _, a := range missing {
					r.ask(func() int { return r.repair(&r.servers[a.server], owner, token, a.clock+modelTTL) }, func(int) {})
				}
				missing = nil
			}
		})
	}
}

func (r *modelRun) undo(owner int) {
	for i := range r.servers {
		r.ask(func() int { r.release(&r.servers[i], owner); return 1 }, func(int) {})
	}
}

// The network.

// ask sends a request and its answer: most quickly, some late, some never, some requests twice.
func (r *modelRun) ask(request func() int, answer func(int)) {
	for copies := 1 + r.random.IntN(20)/19; copies > 0; copies-- {
		if r.random.IntN(100) < r.losses {
			continue
		}
		r.in(r.delay(), func() {
			reply := request()
			if r.random.IntN(100) >= r.losses {
				r.in(r.delay(), func() { answer(reply) })
			}
		})
	}
}

func (r *modelRun) delay() int {
	switch r.random.IntN(25) {
	case 0:
		return r.random.IntN(4 * modelTTL)
	case 1, 2:
		return r.random.IntN(modelTTL)
	}
	return 1 + r.random.IntN(60)
}

func (r *modelRun) in(delay int, do func()) {
	r.sequence++
	byTime.Push(&r.events, modelEvent{r.now + delay, r.sequence, do})
}

type modelEvent struct {
	at, sequence int
	do           func()
}

type modelEvents []modelEvent

func (e modelEvents) Len() int { return len(e) }
func (e modelEvents) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].sequence < e[j].sequence
}
func (e modelEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *modelEvents) Push(x any)   { *e = append(*e, x.(modelEvent)) }
func (e *modelEvents) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

// broken tells which promises the run has broken.
func (r *modelRun) broken() (faults []string) {
	for i, a := range r.grants {
		for _, b := range r.grants[i+1:] { // in the order in which they were won
			switch {
			case a.token == b.token:
				faults = append(faults, fmt.Sprintf("token %d twice, for %d and %d", a.token, a.owner, b.owner))
			case a.won < b.began && a.token > b.token:
				faults = append(faults, fmt.Sprintf("token %d of %d after %d of %d", b.token, b.owner, a.token, a.owner))
			}
			if a.ended > b.won && b.ended > a.won && !r.heedless {
				faults = append(faults, fmt.Sprintf("overlap of %d [%d, %d] and %d [%d, %d]", a.owner, a.won, a.ended, b.owner, b.won, b.ended))
			}
		}
	}
	return faults
}

// TestRedlockModel finds no fault in the rules as they are.
func TestRedlockModel(t *testing.T) {
	t.Parallel()
	grants := 0
	for seed := range uint64(*modelSeeds) {
		run, faults := playModel(seed, modelRules{})
		grants += len(run.grants)
		if len(faults) > 0 {
			t.Fatalf("seed %d: %q", seed, faults)
		}
	}
	if least := 5 * *modelSeeds; grants < least {
		t.Errorf("%d grants in %d runs prove nothing: want %d", grants, *modelSeeds, least)
	}
	t.Logf("%d grants in %d runs", grants, *modelSeeds)
}

// TestRedlockModelFindsFaults leaves out one rule at a time. A rule whose lack is not seen would not be checked.
func TestRedlockModelFindsFaults(t *testing.T) {
	t.Parallel()
	for name, mutant := range map[string]struct {
		rules modelRules
		rare  uint64 // a seed shortly before one that shows a fault which most do not
	}{
		"no write-back":               {rules: modelRules{noWriteBack: true}},
		"not strict":                  {rules: modelRules{notStrict: true}},
		"plain counters with wipes":   {rules: modelRules{plainCounters: true}},
		"no floor after a wipe":       {rules: modelRules{noFloor: true}, rare: 1290},
		"no quarantine, clocks apart": {rules: modelRules{noQuarantine: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			most := max(uint64(*modelSeeds), 500)
			for seed := mutant.rare; seed < mutant.rare+most; seed++ {
				if _, faults := playModel(seed, mutant.rules); len(faults) > 0 {
					t.Logf("seed %d: %s", seed, faults[0])
					return
				}
			}
			t.Fatalf("no fault in %d runs", most)
		})
	}
}
