package locker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// What ends a call's context, whether Done was asked for before, after or not at all.
func TestCallContext(t *testing.T) {
	type name string
	const key name = "key"
	for _, c := range []struct {
		name  string
		end   func(caller, client context.CancelCauseFunc, call *callContext)
		err   error
		cause error
	}{
		{"the call is over", func(_, _ context.CancelCauseFunc, call *callContext) { call.end() }, context.Canceled, context.Canceled},
		{"the caller gives up", func(caller, _ context.CancelCauseFunc, _ *callContext) { caller(errForTest) }, context.Canceled, errForTest},
		{"the client is closed", func(_, client context.CancelCauseFunc, _ *callContext) { client(ErrClosed) }, context.Canceled, ErrClosed},
		{"its time is over", func(_, _ context.CancelCauseFunc, _ *callContext) { time.Sleep(time.Second) }, context.DeadlineExceeded, context.DeadlineExceeded},
	} {
		for _, asked := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				parent, caller := context.WithCancelCause(context.WithValue(t.Context(), key, "value"))
				defer caller(nil)
				owner, client := context.WithCancelCause(t.Context())
				defer client(nil)
				call := within(parent, owner, time.Second)
				defer call.end()
				if asked {
					derived, cancel := context.WithCancel(call)
					defer cancel()
					defer func() {
						if synctest.Wait(); derived.Err() == nil || !errors.Is(context.Cause(derived), c.cause) {
							t.Errorf("%s: a context made of it: %v, %v", c.name, derived.Err(), context.Cause(derived))
						}
					}()
				}
				if at, ok := call.Deadline(); !ok || time.Until(at) != time.Second {
					t.Errorf("Deadline = %v, %v", at, ok)
				}
				if err := call.Err(); err != nil {
					t.Errorf("%s: Err before that: %v", c.name, err)
				}
				c.end(caller, client, call)
				if asked {
					synctest.Wait() // those who are told
				}
				if err := call.Err(); !errors.Is(err, c.err) {
					t.Errorf("%s, Done asked for %v: Err = %v, want %v", c.name, asked, err, c.err)
				}
				select {
				case <-call.Done():
				default:
					t.Errorf("%s, Done asked for %v: Done is open", c.name, asked)
				}
				if cause := context.Cause(call); !errors.Is(cause, c.cause) {
					t.Errorf("%s, Done asked for %v: the cause is %v, want %v", c.name, asked, cause, c.cause)
				}
				if call.Value(key) != "value" {
					t.Errorf("%s: the caller's value is gone", c.name)
				}
			})
		}
	}
}

var errForTest = errors.New("for this test")

// The earlier of two deadlines counts.
func TestCallContextDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sooner, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		call := within(sooner, nil, time.Minute)
		defer call.end()
		if at, _ := call.Deadline(); time.Until(at) != time.Second {
			t.Errorf("Deadline in %v, want that of the caller", time.Until(at))
		}
		<-call.Done()
		if call.Err() != context.DeadlineExceeded { //nolint:errorlint // as every context does
			t.Errorf("Err = %v", call.Err())
		}
	})
}

// What a context costs that nobody asks for Done: itself.
func TestCallContextIsCheap(t *testing.T) {
	parent, cancel := context.WithCancel(t.Context())
	defer cancel()
	if n := testing.AllocsPerRun(100, func() {
		call := within(parent, parent, time.Second)
		_, _ = call.Deadline()
		_ = call.Err()
		call.end()
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}
