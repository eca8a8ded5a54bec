package redisbackend_test

import (
	"errors"
	"testing"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/redisbackend"
)

func TestGuard(t *testing.T) {
	t.Parallel()
	client := direct(t, start(t))
	guard := redisbackend.NewGuard(client)
	holds := func(want string, wantToken uint64) {
		t.Helper()
		if value, token, err := guard.Get(t.Context(), "v"); string(value) != want || token != wantToken || err != nil {
			t.Errorf("stored are %q, %d, %v, want %q, %d", value, token, err, want, wantToken)
		}
	}
	holds("", 0)
	const newest = 1<<53 - 1
	for _, write := range []struct {
		value string
		token uint64
		stale bool
	}{
		{"first", newest - 1, false},
		{"again", newest - 1, false}, // a holder may write more than once
		{"older", newest - 2, true},
		{"newer", newest, false},
		{"late", newest - 1, true},
	} {
		if err := guard.Set(t.Context(), "v", []byte(write.value), write.token); errors.Is(err, locker.ErrStaleToken) != write.stale || err != nil && !write.stale {
			t.Errorf("writing %q: %v", write.value, err)
		}
		if !write.stale {
			holds(write.value, write.token)
		}
	}
	holds("newer", newest)
	if err := guard.Set(t.Context(), "v", nil, 0); err == nil || errors.Is(err, locker.ErrStaleToken) {
		t.Errorf("writing without a token: %v", err)
	}

	if err := client.Set(t.Context(), "text", "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	_, _, get := guard.Get(t.Context(), "text")
	for _, err := range []error{guard.Set(t.Context(), "text", nil, 1), get} {
		if wrapped, ok := errors.AsType[*locker.Error](err); !ok || wrapped.Op != "guard" || wrapped.Key != "text" {
			t.Errorf("a key that is in use for something else: %v", err)
		}
	}
}
