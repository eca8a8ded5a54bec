package locker_test

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/fec20105/locker"
)

func TestGuardRefusesOldTokens(t *testing.T) {
	var g locker.Guard
	for _, c := range []struct {
		key   string
		token uint64
		stale bool
	}{
		{"a", 5, false},
		{"a", 5, false}, // one holder writes often
		{"a", 4, true},
		{"b", 4, false}, // each key has its own
		{"a", 1 << 53, false},
		{"a", 1<<53 - 1, true},
		{"b", 4, false},
		{"c", 0, false},
	} {
		ran := false
		err := g.Do(c.key, c.token, func() error { ran = true; return nil })
		if ran == c.stale || errors.Is(err, locker.ErrStaleToken) != c.stale || (err != nil) != c.stale {
			t.Errorf("%s, token %d: ran %v, %v", c.key, c.token, ran, err)
		}
	}
	err := g.Do("a", 1, func() error { return nil })
	equal(t, "message", err.Error(), `locker: guard "a": stale fencing token`)
}

// The newest token counts from its first write, whatever becomes of that.
func TestGuardRemembersTheTokenOfAFailedWrite(t *testing.T) {
	var g locker.Guard
	equal(t, "Do", g.Do("k", 2, func() error { return errWork }), errWork)
	if err := g.Do("k", 1, func() error { return nil }); !errors.Is(err, locker.ErrStaleToken) {
		t.Error(err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = g.Do("k", 3, func() error { panic("boom") })
	}()
	if err := g.Do("k", 2, func() error { return nil }); !errors.Is(err, locker.ErrStaleToken) {
		t.Error("after a panic:", err)
	}
	if err := g.Do("k", 3, func() error { return nil }); err != nil {
		t.Error("after a panic:", err)
	}
}

// Writes of one key run one after the other, so the last one that is stored is the one with the newest token.
func TestGuardUnderConcurrentWriters(t *testing.T) {
	var g locker.Guard
	var stored, newest uint64
	var all sync.WaitGroup
	for _, i := range rand.Perm(200) {
		token := uint64(i)
		newest = max(newest, token)
		all.Go(func() {
			err := g.Do("k", token, func() error {
				if token < stored {
					t.Errorf("token %d writes over %d", token, stored)
				}
				stored = token
				return nil
			})
			if err != nil && !errors.Is(err, locker.ErrStaleToken) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	equal(t, "stored", stored, newest)
}
