package conformance

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// TestServeAsChild is no test: it is the child process of the tests below.
func TestServeAsChild(t *testing.T) {
	if os.Getenv("LOCKER_CONFORMANCE_CHILD") == "" {
		t.Skip("runs as a child process of other tests")
	}
	if err := Serve(t.Context(), memory().Open); err != nil {
		t.Error(err)
	}
}

// withChild is a harness with a Process whose locks are its own.
func withChild() Harness {
	h := memory()
	h.Process = func(ctx context.Context) *exec.Cmd {
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestServeAsChild$")
		cmd.Env = append(os.Environ(), "LOCKER_CONFORMANCE_CHILD=1")
		return cmd
	}
	return h
}

func TestChildObeys(t *testing.T) {
	t.Parallel()
	saw(t, newTestSuite(t, withChild()).run(t.Context(), row{needs: needProcess, run: func(t *trial) {
		c := t.child()
		key := t.key("")
		first := c.acquire(key, t.TTL)
		if first.Token == 0 || time.Until(first.Deadline) <= 0 {
			t.Errorf("acquire: got %+v, want a token and a deadline", first)
		}
		if a := c.do(command{Do: "acquire", Key: key, TTL: t.TTL}); !a.Held {
			t.Errorf("a second acquire: got %+v, want that it is held", a)
		}
		if a := c.do(command{Do: "extend", Key: key}); a.Error != "" || a.Token != first.Token || !a.Deadline.After(first.Deadline) {
			t.Errorf("extend: got %+v, want a later deadline than %v", a, first.Deadline)
		}
		if a := c.do(command{Do: "err", Key: key}); a.Error != "" {
			t.Errorf("err: got %+v, want none", a)
		}
		if a := c.do(command{Do: "release", Key: key}); a.Error != "" {
			t.Errorf("release: got %+v, want no error", a)
		}
		if a := c.do(command{Do: "err", Key: t.key("other")}); !strings.Contains(a.Error, "never acquired") {
			t.Errorf("err of a lock that it has not: got %+v", a)
		}
		if a := c.do(command{Do: "jump", Key: key}); !strings.Contains(a.Error, `unknown command "jump"`) {
			t.Errorf("a command that does not exist: got %+v", a)
		}
	}}), Passed)
}

func TestChildThatWasStoppedKnowsItsLossAtOnce(t *testing.T) {
	t.Parallel()
	saw(t, newTestSuite(t, withChild()).run(t.Context(), row{needs: needProcess, run: func(t *trial) {
		c := t.child()
		key := t.key("")
		c.acquire(key, t.TTL)
		c.stop()
		t.pass(t.TTL + 50*time.Millisecond)
		c.send(command{Do: "err", Key: key})
		c.resume()
		if a := c.answer(); !a.Lost {
			t.Errorf("after a stop longer than the TTL: got %+v, want a loss", a)
		}
	}}), Passed)
}

func TestChildThatIsKilledSaysSo(t *testing.T) {
	t.Parallel()
	saw(t, newTestSuite(t, withChild()).run(t.Context(), row{needs: needProcess, run: func(t *trial) {
		c := t.child()
		c.acquire(t.key(""), t.TTL)
		c.kill()
		c.do(command{Do: "err", Key: t.key("")})
	}}), Failed, "child process: ")
}

func TestServeEndsWithItsInput(t *testing.T) {
	t.Parallel()
	backend := membackend.New()
	open := func(context.Context, *Network) (locker.Locker, error) { return backend, nil }
	var out bytes.Buffer
	in := strings.NewReader(`{"Do":"acquire","Key":"k","TTL":10000000000}`)
	if err := serve(t.Context(), open, in, &out); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), `{"Token":1,"Deadline":`) {
		t.Errorf("answered %q", out.String())
	}
	if held := backend.Store().Holdings(); len(held) != 0 {
		t.Errorf("after its end it holds %v", held)
	}
	if _, err := backend.Acquire(t.Context(), ask("x")); !errors.Is(err, locker.ErrClosed) {
		t.Errorf("the Locker is open after the end: %v", err)
	}
	if err := serve(t.Context(), open, strings.NewReader("what?"), &out); err == nil {
		t.Error("input that is no command is accepted")
	}
	no := errors.New("no server")
	if err := serve(t.Context(), func(context.Context, *Network) (locker.Locker, error) { return nil, no }, in, &out); !errors.Is(err, no) {
		t.Errorf("a Locker that cannot be opened: %v", err)
	}
}
