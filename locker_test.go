package locker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

func TestValidate(t *testing.T) {
	good := locker.Request{Key: "k", ID: "id", TTL: time.Second}
	for _, c := range []struct {
		want   string // in the message; "" for a good request
		change func(*locker.Request)
	}{
		{"", func(*locker.Request) {}},
		{"", func(r *locker.Request) { r.Key = strings.Repeat("x", 512) }},
		{"", func(r *locker.Request) { r.Key = "{a}:/\n ключ" }},
		{"", func(r *locker.Request) { r.ID = strings.Repeat("~", 36) }},
		{"", func(r *locker.Request) { r.TTL = locker.MinTTL }},
		{"", func(r *locker.Request) { r.TTL = locker.MaxTTL }},
		{"", func(r *locker.Request) { r.Holder = strings.Repeat("x", 1024) }},
		{"the key is empty", func(r *locker.Request) { r.Key = "" }},
		{"the key has 513 bytes: the most is 512", func(r *locker.Request) { r.Key = strings.Repeat("x", 513) }},
		{"the key is not valid UTF-8", func(r *locker.Request) { r.Key = "\xc3\x28" }},
		{"the key contains a NUL byte", func(r *locker.Request) { r.Key = "a\x00" }},
		{`the request's ID "" is not`, func(r *locker.Request) { r.ID = "" }},
		{`the request's ID "a b" is not`, func(r *locker.Request) { r.ID = "a b" }},
		{"the request's ID", func(r *locker.Request) { r.ID = "é" }},
		{"the request's ID", func(r *locker.Request) { r.ID = "\x7f" }},
		{"the request's ID", func(r *locker.Request) { r.ID = strings.Repeat("x", 37) }},
		{"a TTL of 0s is too short: the least is 10ms", func(r *locker.Request) { r.TTL = 0 }},
		{"a TTL of -1s is too short", func(r *locker.Request) { r.TTL = -time.Second }},
		{"is too long", func(r *locker.Request) { r.TTL = locker.MaxTTL + 1 }},
		{"the holder's label has 1025 bytes: the most is 1024", func(r *locker.Request) { r.Holder = strings.Repeat("x", 1025) }},
		{"the holder's label is not valid UTF-8", func(r *locker.Request) { r.Holder = "\xff" }},
	} {
		r := good
		c.change(&r)
		err := r.Validate()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%.100s: got %v, want %q", fmt.Sprintf("%+v", r), err, c.want)
		}
	}
}

func TestNamesOfCapabilitiesAndReasons(t *testing.T) {
	for got, want := range map[string]string{
		locker.EarlyFree(0).String():        "none",
		locker.EarlyFreeDisconnect.String(): "disconnect",
		(locker.EarlyFreeDisconnect | locker.EarlyFreeRestart | locker.EarlyFreeFailover).String(): "disconnect, restart, failover",
		(locker.EarlyFreeRestart | locker.EarlyFreeFailover).String():                              "restart, failover",

		locker.FencingVolatile.String(): "nothing",
		locker.FencingRestart.String():  "restart",
		locker.FencingCrash.String():    "crash",
		locker.FencingFailover.String(): "failover",
		locker.Fencing(9).String():      "Fencing(9)",

		locker.ReasonExpired.String():      "expired",
		locker.ReasonTaken.String():        "taken",
		locker.ReasonDisconnected.String(): "disconnected",
		locker.ReasonMaxHold.String():      "max hold",
		locker.ReasonClosed.String():       "closed",
		locker.Reason(0).String():          "Reason(0)",
		locker.Reason(6).String():          "Reason(6)",
	} {
		equal(t, "name", got, want)
	}
	if locker.FencingVolatile >= locker.FencingRestart || locker.FencingRestart >= locker.FencingCrash || locker.FencingCrash >= locker.FencingFailover {
		t.Error("the values of Fencing do not rise")
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		is   error
		want string
	}{
		{&locker.HeldError{Key: "a"}, locker.ErrHeld, `locker: "a" is held by another`},
		{&locker.HeldError{Key: "a", Remaining: 1500600 * time.Microsecond}, locker.ErrHeld, `locker: "a" is held by another for another 1.501s`},
		{&locker.HeldError{Key: "a", Holder: "x\n"}, locker.ErrHeld, `locker: "a" is held by "x\n"`},
		{&locker.HeldError{Key: "a", Holder: "x", Remaining: time.Second}, locker.ErrHeld, `locker: "a" is held by "x" for another 1s`},
		{
			&locker.LostError{Key: "a", Token: 7, Reason: locker.ReasonTaken}, locker.ErrLost,
			`locker: lock "a" (token 7) lost: taken`,
		},
		{
			&locker.Error{Op: "acquire", Key: "invoice/42", Backend: "redis", Err: errRefused}, errRefused,
			`locker: redis: acquire "invoice/42": connection refused`,
		},
		{&locker.Error{Op: "open", Err: locker.ErrClosed}, locker.ErrClosed, "locker: open: closed"},
		{&locker.Error{Op: "release", Key: "a", Err: &locker.HeldError{Key: "a"}}, locker.ErrHeld, `locker: release "a": "a" is held by another`},
		{&locker.Error{Op: "list"}, nil, "locker: list: "},
	} {
		equal(t, "message", c.err.Error(), c.want)
		for _, fact := range []error{locker.ErrHeld, locker.ErrLost, locker.ErrReleased, locker.ErrClosed, locker.ErrStaleToken, errRefused} {
			equal(t, c.want+" is "+fact.Error(), errors.Is(c.err, fact), errors.Is(c.is, fact))
		}
	}
}

// A decorator leaves keys and leases alone, and says so by Unwrap.
type decorator struct{ locker.Locker }

func (d decorator) Unwrap() locker.Locker { return d.Locker }

// A prefixer changes keys, and so has no Unwrap.
type prefixer struct{ locker.Locker }

// A blind decorator inspects by itself.
type blind struct{ decorator }

func (blind) Inspect(context.Context, string) (locker.Holding, error) {
	return locker.Holding{}, errRefused
}

func TestAsLooksThroughUnwrap(t *testing.T) {
	back := membackend.New()
	for name, c := range map[string]struct {
		l    locker.Locker
		want bool
	}{
		"itself":            {back, true},
		"decorated":         {decorator{back}, true},
		"twice":             {decorator{decorator{back}}, true},
		"behind a prefixer": {prefixer{back}, false},
		"and decorated":     {decorator{prefixer{back}}, false},
		"nothing inside":    {decorator{nil}, false},
		"nothing":           {nil, false},
	} {
		inspector, ok := locker.As[locker.Inspector](c.l)
		if ok != c.want || ok && inspector != locker.Inspector(back) {
			t.Errorf("%s: got %v, %v", name, inspector, ok)
		}
	}
	if got, ok := locker.As[locker.Inspector](blind{decorator{back}}); !ok || got == locker.Inspector(back) {
		t.Error("the outermost does not win")
	}
	if got, ok := locker.As[*membackend.Backend](decorator{back}); !ok || got != back {
		t.Error("a backend's own type is not found")
	}
	if _, err := newClient(t, blind{decorator{back}}).Inspect(t.Context(), "k"); !errors.Is(err, errRefused) {
		t.Error("Client.Inspect:", err)
	}
}
