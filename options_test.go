package locker_test

import (
	"context"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// Bad values are refused where they are given, with a message that names the value and says what to do, and nothing is sent.
func TestBadOptions(t *testing.T) {
	warn := func(*locker.Lock) {}
	for _, c := range []struct {
		want string // in the message
		opts []locker.Option
	}{
		{"WithTTL(0s): a TTL is between 10ms and", options(locker.WithTTL(0))},
		{"WithTTL(-1s)", options(locker.WithTTL(-time.Second))},
		{"WithTTL(9.999999ms)", options(locker.WithTTL(locker.MinTTL - 1))},
		{"WithTTL(2562047h47m16.854775807s)", options(locker.WithTTL(math.MaxInt64))},
		{"a TTL is between", options(locker.WithTTL(locker.MaxTTL + 1))},
		{"WithHeartbeat(0s): the duration must be greater than zero", options(locker.WithHeartbeat(0))},
		{"WithHeartbeat(-1ns)", options(locker.WithHeartbeat(-1))},
		{"a heartbeat every 9s does not keep a TTL of 9s alive", options(locker.WithHeartbeat(ttl))},
		{"a heartbeat every 8.908s", options(locker.WithHeartbeat(trust))},
		{"a heartbeat every 2s does not keep a TTL of 1s alive", options(locker.WithHeartbeat(2*time.Second), locker.WithTTL(time.Second))},
		{"a heartbeat every 2s", options(locker.WithTTL(time.Second), locker.WithHeartbeat(2*time.Second))},
		{"WithWait(0s)", options(locker.WithWait(0))},
		{"WithWait(-1s)", options(locker.WithWait(-time.Second))},
		{"WithMaxHold(0s)", options(locker.WithMaxHold(0))},
		{"WithMinHold(-1h0m0s)", options(locker.WithMinHold(-time.Hour))},
		{"a minimum hold of 10s is longer than the TTL of 9s", options(locker.WithMinHold(10 * time.Second))},
		{"a minimum hold of 3s is longer than the maximum hold of 2s", options(locker.WithMinHold(3*time.Second), locker.WithMaxHold(2*time.Second))},
		{"WithReleaseTimeout(0s)", options(locker.WithReleaseTimeout(0))},
		{"WithWarning(0s): it takes a duration greater than zero and a function", options(locker.WithWarning(0, warn))},
		{"WithWarning(1s)", options(locker.WithWarning(time.Second, nil))},
		{"a warning 9s before the end of a TTL of 9s would come at once", options(locker.WithWarning(ttl, warn))},
		{"WithHolder: the label must be UTF-8 of at most 1024 bytes", options(locker.WithHolder(strings.Repeat("x", 1025)))},
		{"WithHolder", options(locker.WithHolder("\xff"))},
		{"WithLogger(nil): leave the option out", options(locker.WithLogger(nil))},
		{"option 2 is nil", options(locker.WithNoWait(), nil)},
	} {
		s, client := setup(t)
		refuse := func(op string, err error) {
			t.Helper()
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "locker: "+op) {
				t.Errorf("%s: got %q, want %q in it", op, err, c.want)
			}
		}
		_, err := client.Acquire(t.Context(), "k", c.opts...)
		refuse(`acquire "k": `, err)
		var doOpts []locker.DoOption
		for _, o := range c.opts {
			if o == nil {
				doOpts = append(doOpts, nil)
				continue
			}
			doOpts = append(doOpts, o)
		}
		refuse(`do "k": `, client.Do(t.Context(), "k", func(context.Context, *locker.Lock) error { return nil }, doOpts...))
		withTTL := append(options(locker.WithTTL(ttl)), c.opts...)
		if c.want == "option 2 is nil" {
			withTTL = c.opts
		}
		_, err = locker.New(membackend.New(), withTTL...)
		refuse("open: ", err)
		_, err = locker.Open(t.Context(), "mem://options", withTTL...)
		refuse("open: ", err)
		equal(t, "requests", len(s.calls), 0)
	}
	_, client := setup(t)
	err := client.Do(t.Context(), "k", func(context.Context, *locker.Lock) error { return nil }, locker.WithCompensation(nil))
	if err == nil || !strings.Contains(err.Error(), "WithCompensation(nil): leave the option out") {
		t.Error(err)
	}
}

func TestCompensationIsForDoAlone(t *testing.T) {
	if _, ok := (&undone{}).option().(locker.Option); ok {
		t.Error("WithCompensation can be given to Acquire, which runs none")
	}
}

func options(opts ...locker.Option) []locker.Option { return opts }

func TestGoodOptionsAtTheirLimits(t *testing.T) {
	_, client := setup(t)
	for _, opts := range [][]locker.Option{
		options(locker.WithTTL(locker.MinTTL)),
		options(locker.WithTTL(locker.MaxTTL)),
		options(locker.WithHeartbeat(trust - 1)),
		options(locker.WithMinHold(ttl), locker.WithMaxHold(ttl)),
		options(locker.WithWarning(trust-1, func(*locker.Lock) {})),
		options(locker.WithHolder("")),
		options(locker.WithHolder(strings.Repeat("é", 512))),
		options(locker.WithWait(math.MaxInt64), locker.WithReleaseTimeout(time.Hour), locker.WithMaxHold(math.MaxInt64)),
		options(locker.WithHeartbeat(time.Second), locker.WithTTL(2*time.Second)), // the order does not matter
	} {
		l, err := client.Acquire(t.Context(), "k", opts...)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := l.Err(); err != nil {
			t.Error(err)
		}
		if err := l.Context().Err(); err != nil {
			t.Error(err)
		}
		if err := l.Release(t.Context()); err != nil {
			t.Error(err)
		}
		client.Locker().(*spy).store.Expire("k") // a minimum hold
	}
}

// What is given to a call holds for that call, over what is given to New.
func TestOptionsOfACallAreItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, c := setup(t, locker.WithNoWait(), locker.WithHolder("default"), locker.WithoutHeartbeat())
		l := acquire(t, c, locker.WithTTL(30*time.Second), locker.WithWait(time.Second), locker.WithHolder("mine"), locker.WithHeartbeat(10*time.Second))
		one := s.seen("acquire")[0].req
		if one.TTL != 30*time.Second || one.NoWait || one.NoExtend || one.Holder != "mine" {
			t.Errorf("%+v", one)
		}
		s.at(11 * time.Second)
		equal(t, "extends", s.moments("extend"), seconds(10))
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		acquire(t, c)
		two := s.seen("acquire")[1].req
		if two.TTL != ttl || !two.NoWait || !two.NoExtend || two.Holder != "default" {
			t.Errorf("%+v", two)
		}
	})
}

func TestDefaults(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSpy(t)
		c, err := locker.New(s)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		acquire(t, c)
		req := s.seen("acquire")[0].req
		if req.TTL != 15*time.Second || req.NoWait || req.NoExtend || !strings.Contains(req.Holder, "pid") {
			t.Errorf("%+v", req)
		}
		s.at(11 * time.Second)
		equal(t, "extends", s.moments("extend"), seconds(5, 10))
	})
}
