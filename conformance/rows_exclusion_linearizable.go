package conformance

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/fec20105/locker"
)

// operation is one call and what is known of it. Times count from the beginning of the history, in nanoseconds.
type operation struct {
	do         string // "acquire", "extend", "release", "clean up"
	key, id    string
	call, over int64 // over is never, while it may still take effect
	known      bool  // whether it was answered
	held, lost bool  // answered ErrHeld or ErrLost
	token      uint64
	until      int64 // of an answered acquire or extend: Start + TTL
	ttl        int64 // as asked
}

const never = math.MaxInt64

// lockState is a lock as the model sees it.
type lockState struct {
	holder string // the grant's ID; "" if it is free
	until  int64  // before it, the grant does not end by itself
	token  uint64 // the last that is known
	now    int64  // no later operation can have happened before
}

// step is the specification. An operation takes place at a moment between its call and its end, and the earliest
// possible one allows the most afterwards. A grant that has run out may end or not: it does where another answer needs
// it. What was not answered can always be placed after everything else, where it explains nothing.
func (s lockState) step(op operation) (lockState, bool) {
	s.now = max(s.now, op.call)
	mine := s.holder == op.id
	switch {
	case !op.known && op.do == "acquire":
		if s.holder == "" {
			s.holder, s.until = op.id, s.now+op.ttl
		}
	case !op.known && op.do == "extend":
		if mine {
			s.until = max(s.until, s.now+op.ttl)
		}
	case op.held:
		if s.holder == "" || mine {
			return s, false
		}
	case op.do == "acquire":
		if !s.expires(op.over) || op.token <= s.token {
			return s, false
		}
		s.holder, s.until, s.token = op.id, op.until, op.token
	case op.lost:
		if mine && !s.expires(op.over) {
			return s, false
		}
	case op.do == "extend":
		if !mine {
			return s, false
		}
		s.until = max(s.until, op.until)
	case mine: // a release or clean-up
		s.holder = ""
	case op.known && op.do == "release":
		return s, false
	}
	return s, s.now <= op.over
}

// expires ends a grant that may have run out by the moment over, and is true if nobody holds the lock then.
func (s *lockState) expires(over int64) bool {
	if s.holder != "" {
		if max(s.now, s.until) > over {
			return false
		}
		s.now, s.holder = max(s.now, s.until), ""
	}
	return true
}

var lockModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		keys := make(map[string]int)
		var parts [][]porcupine.Operation
		for _, op := range history {
			key := op.Input.(operation).key
			i, ok := keys[key]
			if !ok {
				i = len(parts)
				keys[key] = i
				parts = append(parts, nil)
			}
			parts[i] = append(parts[i], op)
		}
		return parts
	},
	Init: func() any { return lockState{} },
	Step: func(state, input, _ any) (bool, any) {
		next, ok := state.(lockState).step(input.(operation))
		return ok, next
	},
	DescribeOperation: func(input, _ any) string { return input.(operation).String() },
	DescribeState: func(state any) string {
		s := state.(lockState)
		if s.holder == "" {
			return fmt.Sprintf("free, last token %d", s.token)
		}
		return fmt.Sprintf("%s holds it until %v, last token %d", short(s.holder), time.Duration(s.until), s.token)
	},
}

// String is the operation for people.
func (o operation) String() string {
	text := fmt.Sprintf("%s %s: ", o.do, short(o.id))
	switch {
	case !o.known:
		return text + "unknown"
	case o.held:
		return text + "held"
	case o.lost:
		return text + "lost"
	case o.do == "acquire":
		return text + fmt.Sprintf("token %d until %v", o.token, time.Duration(o.until))
	}
	return text + "ok"
}

// short is the end of an ID: the beginnings of UUIDs that were minted at one time are alike.
func short(id string) string { return id[max(0, len(id)-6):] }

// historian writes down what several Lockers are asked and answer.
type historian struct {
	t     *trial
	began time.Time
	mu    sync.Mutex
	ops   []porcupine.Operation
}

func (h *historian) at(moment time.Time) int64 { return int64(moment.Sub(h.began)) }

// note writes op down, with its outcome, and returns it.
func (h *historian) note(client int, op operation, err error) operation {
	op.over = h.at(time.Now())
	gaveUp := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
	op.held, op.lost = errors.Is(err, locker.ErrHeld) && !gaveUp, errors.Is(err, locker.ErrLost)
	op.known = err == nil || op.held || op.lost
	if !op.known {
		op.over = never
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: op, Call: op.call, Return: op.over})
	return op
}

// withdrawn says that the client's last operation, an acquire without an answer, cannot take effect any more.
func (h *historian) withdrawn(client int) {
	over := h.at(time.Now())
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := len(h.ops) - 1; i >= 0; i-- {
		if op, ok := h.ops[i].Input.(operation); ok && h.ops[i].ClientId == client && op.do == "acquire" {
			op.over = over
			h.ops[i].Input, h.ops[i].Return = op, over
			return
		}
	}
}

// linearizable lets 6 clients use 3 keys for 4 T, in good order and not. Every other link fails: what is not answered
// explains much, and would hide what is wrong if it were all.
func linearizable(t *trial) {
	h := &historian{t: t, began: time.Now()}
	keys := []string{t.key("a"), t.key("b"), t.key("c")}
	working, stop := context.WithTimeout(t.ctx, 4*t.TTL)
	defer stop()
	for client := range 6 {
		l, net := t.open()
		if client%2 == 0 {
			t.spawn(func() { t.injectFaults(working, net) })
		}
		t.spawn(func() {
			for sometimes(working, time.Millisecond, t.TTL/20) {
				h.hold(client, l, keys[rand.N(len(keys))])
			}
		})
	}
	t.spawned.Wait()
	grants := 0
	for _, op := range h.ops {
		if o, ok := op.Input.(operation); ok && o.do == "acquire" && o.known && !o.held {
			grants++
		}
	}
	if least := 6; grants < least {
		t.Errorf("a history of %d operations has %d grants, fewer than %d: too few to show anything", len(h.ops), grants, least)
	}
	result, info := porcupine.CheckOperationsVerbose(lockModel, h.ops, 100*t.slack)
	switch result {
	case porcupine.Illegal:
		path := t.artifact("history.html")
		if err := porcupine.VisualizePath(lockModel, info, path); err != nil {
			t.Errorf("the history cannot be drawn: %v", err)
		}
		t.Errorf("no order of these %d operations is that of one lock; the history is drawn in %s", len(h.ops), path)
	case porcupine.Unknown:
		t.Skipf("a history of %d operations was too long to be judged", len(h.ops))
	}
}

// hold makes one try to get the key, and uses and gives up or forgets the lease.
func (h *historian) hold(client int, l locker.Locker, key string) {
	t := h.t
	call := func(f func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(t.ctx, t.TTL/8)
		defer cancel()
		return f(ctx)
	}
	req := t.request(key, noWait)
	op := operation{key: key, id: req.ID, ttl: int64(req.TTL)}
	var lease locker.Lease
	answer := func(do string, f func(context.Context) error) operation {
		op := op
		op.do, op.call = do, h.at(time.Now())
		err := call(f)
		if err == nil {
			op.token, op.until = lease.Token, h.at(lease.Start.Add(lease.TTL))
		}
		return h.note(client, op, err)
	}
	got := answer("acquire", func(ctx context.Context) (err error) {
		lease, err = l.Acquire(ctx, req)
		return err
	})
	if !got.known {
		if undone := answer("clean up", func(ctx context.Context) error {
			return l.Release(ctx, locker.Lease{Key: key, ID: req.ID})
		}); undone.known {
			h.withdrawn(client)
		}
	}
	if !got.known || got.held {
		return
	}
	// Half of the leases are used in good order, the others are forgotten, or extended or released too late.
	extends, release, least, most := rand.N(3), true, time.Millisecond, t.TTL/8
	switch rand.N(6) {
	case 0:
		release = false
	case 1, 2:
		extends, least, most = rand.N(2), t.TTL, t.TTL+t.TTL/4
	}
	for range extends {
		if !sometimes(t.ctx, least, most) {
			return
		}
		if answer("extend", func(ctx context.Context) error {
			fresh, err := l.Extend(ctx, lease)
			if err == nil {
				lease = fresh
			}
			return err
		}).lost {
			return
		}
	}
	if release && sometimes(t.ctx, least, most) {
		answer("release", func(ctx context.Context) error { return l.Release(ctx, lease) })
	}
}
