package conformance

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/fec20105/locker"
)

var workRows = []row{{
	name: "compensation",
	clause: "When the lock was lost Do answers ErrLost, also if the work succeeded, and the compensation has run " +
		"once, after the work; it never runs otherwise.",
	run: compensation,
}}

var (
	errWork = errors.New("the work failed")
	errUndo = errors.New("the compensation failed")
)

// deed is one use of Do, and what must come of it.
type deed struct {
	name      string
	work      func(ctx context.Context, t *trial) error
	undo      error   // what the compensation returns
	lost      bool    // the compensation must run
	matches   []error // what Do's error must match
	cancelled bool    // Do's ctx ends while the work runs
}

var deeds = []deed{
	{name: "good", work: func(context.Context, *trial) error { return nil }},
	{name: "failed", work: func(context.Context, *trial) error { return errWork }, matches: []error{errWork}},
	{name: "cancelled", cancelled: true, work: untilEnd, matches: []error{context.Canceled}},
	{name: "lost", lost: true, work: func(ctx context.Context, t *trial) error {
		_ = untilEnd(ctx, t)
		return nil
	}},
	{name: "lost and failed", lost: true, undo: errUndo, matches: []error{errWork, errUndo}, work: func(ctx context.Context, t *trial) error {
		_ = untilEnd(ctx, t)
		return errWork
	}},
	{name: "lost and deaf", lost: true, work: func(_ context.Context, t *trial) error {
		t.pass(2 * t.TTL)
		return nil
	}},
	{name: "lost and cancelled", lost: true, cancelled: true, work: func(_ context.Context, t *trial) error {
		t.pass(2 * t.TTL)
		return nil
	}},
}

// untilEnd is work that goes on until its ctx ends.
func untilEnd(ctx context.Context, _ *trial) error {
	<-ctx.Done()
	return ctx.Err()
}

func compensation(t *trial) {
	client, _ := t.client(locker.WithoutHeartbeat()) // so that every lock of work that is long enough is lost
	observer, _ := t.open()
	t.parallel(len(deeds)+1, func(i int) {
		if i < len(deeds) {
			t.compensates(client, deeds[i])
		} else {
			t.panics(client, observer)
		}
	})
}

// compensates does d and looks at what comes of it.
func (t *trial) compensates(client *locker.Client, d deed) {
	ctx, cancel := context.WithCancel(t.ctx)
	defer cancel()
	var working atomic.Bool
	var token atomic.Uint64
	var undone []*locker.LostError
	key := t.key(d.name)
	err := client.Do(ctx, key, func(ctx context.Context, lock *locker.Lock) error {
		working.Store(true)
		defer working.Store(false)
		token.Store(lock.Token())
		if d.cancelled {
			cancel()
		}
		return d.work(ctx, t)
	}, locker.WithCompensation(func(ctx context.Context, lost *locker.LostError) error {
		undone = append(undone, lost)
		if working.Load() {
			t.Errorf("%s: compensated while the work was running", d.name)
		}
		if _, bounded := ctx.Deadline(); !bounded || ctx.Err() != nil {
			t.Errorf("%s: the ctx of the compensation says %v and has a deadline: %v", d.name, ctx.Err(), bounded)
		}
		return d.undo
	}))

	if working.Load() {
		t.Errorf("%s: Do returned before the work", d.name)
	}
	for _, want := range d.matches {
		if !errors.Is(err, want) {
			t.Errorf("%s: Do returned %v, want an error that matches %v", d.name, err, want)
		}
	}
	if errors.Is(err, locker.ErrLost) != d.lost || !d.lost && d.matches == nil && err != nil {
		t.Errorf("%s: Do returned %v; the lock was lost: %v", d.name, err, d.lost)
	}
	switch {
	case !d.lost && len(undone) > 0:
		t.Errorf("%s: compensated although nothing was lost", d.name)
	case d.lost && len(undone) != 1:
		t.Errorf("%s: compensated %d times, want once", d.name, len(undone))
	case d.lost:
		if lost := undone[0]; lost.Key != key || lost.Token != token.Load() || lost.Reason != locker.ReasonExpired {
			t.Errorf("%s: compensated for %v, want %q with token %d, expired", d.name, lost, key, token.Load())
		}
	}
}

// panics checks that a panic in the work frees the lock and goes on.
func (t *trial) panics(client *locker.Client, observer locker.Locker) {
	const scream = "out of ink"
	key := t.key("panic")
	defer func() {
		if p := recover(); p != scream {
			t.Errorf("the panic of the work came out of Do as %v", p)
		}
		t.freeWithin(observer, key, time.Now(), t.soon())
	}()
	err := client.Do(t.ctx, key, func(context.Context, *locker.Lock) error { panic(scream) },
		locker.WithCompensation(func(context.Context, *locker.LostError) error {
			t.Errorf("compensated for a panic, although nothing was lost")
			return nil
		}))
	t.Errorf("Do returned %v after a panic of the work", err)
}
