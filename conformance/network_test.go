package conformance

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// ack is what an echo does not answer.
const ack = "ack"

// echo is a server that answers each request with the same bytes, and remembers what it got.
type echo struct {
	net.Listener
	conns sync.WaitGroup

	mu    sync.Mutex
	got   bytes.Buffer
	ended []error // how its connections ended: nil for an end, or the error
}

func newEcho(t *testing.T) *echo {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{Listener: listener}
	e.conns.Go(func() {
		for {
			c, err := e.Accept()
			if err != nil {
				return
			}
			e.conns.Go(func() { e.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = e.Close()
		e.conns.Wait()
	})
	return e
}

func (e *echo) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	buffer := make([]byte, 1<<16)
	for {
		n, err := c.Read(buffer)
		e.mu.Lock()
		e.got.Write(buffer[:n])
		if errors.Is(err, io.EOF) {
			e.ended = append(e.ended, nil)
		} else if err != nil {
			e.ended = append(e.ended, err)
		}
		e.mu.Unlock()
		if err != nil {
			return
		}
		if string(buffer[:n]) != ack {
			_, _ = c.Write(buffer[:n]) // the next read tells
		}
	}
}

func (e *echo) has(text string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return bytes.Contains(e.got.Bytes(), []byte(text))
}

func (e *echo) ends() []error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]error(nil), e.ended...)
}

func newNetwork(t *testing.T) *Network {
	t.Helper()
	n := NewNetwork()
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if len(n.conns) != 0 || len(n.calls) != 0 {
			t.Errorf("after Close %d connections and %d calls are left", len(n.conns), len(n.calls))
		}
	})
	return n
}

func dial(t *testing.T, n *Network, e *echo) net.Conn {
	t.Helper()
	c, err := n.DialContext(t.Context(), "tcp", e.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// send writes text.
func send(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("writing %q: %v", text, err)
	}
}

// expect reads text within 5 s.
func expect(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got, err, text)
	}
}

// expectSilence reads nothing for 60 ms.
func expectSilence(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(60 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(make([]byte, 10))
	if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v; want a time-out", n, err)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Fatalf("%v does not look like a time-out of the network", err)
	}
}

// expectReset reads and finds the connection reset.
func expectReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read: %v; want ECONNRESET", err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Fatal("a connection that was reset can be written to")
	}
}

func within(t *testing.T, what string, cond func() bool) {
	t.Helper()
	if !poll(5*time.Second, cond) {
		t.Fatalf("after 5 s still not true: %s", what)
	}
}

func TestNetworkCutPassesNoByte(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	send(t, c, "before")
	expect(t, c, "before")
	n.Cut()
	down := n.Stats().BytesDown
	send(t, c, "during")
	expectSilence(t, c)
	if e.has("during") || n.Stats().BytesDown != down {
		t.Fatal("a byte has passed a cut link")
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.DialContext(short, "tcp", e.Addr().String()); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a dial over a cut link: %v; want DeadlineExceeded", err)
	}
	n.Heal()
	expect(t, c, "during")
	dial(t, n, e)
}

func TestNetworkCutKeepsTheReplyToo(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Delay(0, 50*time.Millisecond)
	send(t, c, "asked")
	within(t, "the server has got the request", func() bool { return e.has("asked") })
	n.Cut()
	n.Delay(0, 0)
	expectSilence(t, c)
	if down := n.Stats().BytesDown; down != 0 {
		t.Fatalf("%d bytes count as having come although the link keeps them", down)
	}
	n.Heal()
	expect(t, c, "asked")
}

func TestNetworkCutClientVanishesHalfOpen(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Cut()
	send(t, c, "last words")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if open := n.Stats().Open; open != 0 {
		t.Fatalf("%d connections are open for the client", open)
	}
	if poll(50*time.Millisecond, func() bool { return len(e.ends()) > 0 }) {
		t.Fatal("the server has seen the end over a cut link")
	}
	n.Heal()
	within(t, "the server has got the last words, and then the end", func() bool {
		ends := e.ends()
		return len(ends) == 1 && e.has("last words")
	})
}

func TestNetworkCutLabel(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	n.LabelBy(func(written []byte) string {
		if bytes.Contains(written, []byte("SUBSCRIBE")) {
			return "notify"
		}
		return ""
	})
	if n.Has("notify") {
		t.Fatal("a label before any connection has it")
	}
	plain, notify := dial(t, n, e), dial(t, n, e)
	send(t, notify, "HELLO")
	expect(t, notify, "HELLO")
	send(t, notify, "SUBSCRIBE")
	expect(t, notify, "SUBSCRIBE")
	if !n.Has("notify") {
		t.Fatal("the connection has got no label")
	}
	n.Cut("notify")
	send(t, notify, "ping")
	send(t, plain, "ping")
	expect(t, plain, "ping")
	expectSilence(t, notify)
	n.Heal()
	expect(t, notify, "ping")

	passes := n.Gate("news")
	n.Cut("news")
	if passes() || !n.Has("news") {
		t.Fatal("a gate does not follow its label")
	}
	n.Heal()
	if !passes() {
		t.Fatal("a gate stays closed after Heal")
	}
}

func TestNetworkHangAcceptsAndSaysNothing(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	n.Hang()
	c := dial(t, n, e)
	send(t, c, "hello")
	expectSilence(t, c)
	if e.has("hello") {
		t.Fatal("a request has reached a hanging server")
	}
	n.Heal()
	expect(t, c, "hello")
}

func TestNetworkReset(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	send(t, c, "hello")
	expect(t, c, "hello")
	n.Reset()
	expectReset(t, c)
	within(t, "the server has seen a reset too", func() bool {
		ends := e.ends()
		return len(ends) == 1 && ends[0] != nil
	})
	again := dial(t, n, e)
	send(t, again, "again")
	expect(t, again, "again")
}

func TestNetworkDelay(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Delay(60*time.Millisecond, 90*time.Millisecond)
	began := time.Now()
	send(t, c, "slow")
	if e.has("slow") {
		t.Fatal("the request came without delay")
	}
	within(t, "the server has got the request", func() bool { return e.has("slow") })
	if took := time.Since(began); took < 60*time.Millisecond {
		t.Fatalf("the request took %v, want 60 ms", took)
	}
	expect(t, c, "slow")
	if took := time.Since(began); took < 150*time.Millisecond {
		t.Fatalf("request and reply took %v, want 150 ms", took)
	}
	began = time.Now()
	dial(t, n, e)
	if took := time.Since(began); took < 150*time.Millisecond {
		t.Fatalf("a dial took %v, want 150 ms", took)
	}
}

func TestNetworkLandsWhatItsSenderHasGivenUp(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Hold()
	send(t, c, "late")
	expectSilence(t, c)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if e.has("late") {
		t.Fatal("a request that is held has arrived")
	}
	if err := n.Land(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !e.has("late") {
		t.Fatal("Land has returned before the request has landed")
	}
	if len(e.ends()) != 0 {
		t.Fatal("the server has seen the end of a connection that Land should leave open")
	}
	other := dial(t, n, e)
	send(t, other, "later")
	expectSilence(t, other)
	n.Heal()
	expect(t, other, "later")
	within(t, "the server sees the end after Heal", func() bool { return len(e.ends()) == 1 })
}

func TestNetworkHoldLetsRepliesPass(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Delay(0, 50*time.Millisecond)
	send(t, c, "before")
	within(t, "the server has got the request", func() bool { return e.has("before") })
	n.Hold()
	expect(t, c, "before")
}

func TestNetworkLandIsBoundByItsContext(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Hold()
	n.Cut()
	send(t, c, "held and cut")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := n.Land(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Land over a cut link: %v; want DeadlineExceeded", err)
	}
}

func TestNetworkLandWaitsForNoAnswerWhereNoneComes(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	mute, c := dial(t, n, e), dial(t, n, e)
	n.Hold()
	send(t, mute, ack)
	send(t, c, "request")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := n.Land(ctx); err != nil {
		t.Fatalf("Land waits for the answer to what is never answered: %v", err)
	}
	if !e.has(ack) || !e.has("request") {
		t.Fatal("Land has returned before all has landed")
	}
	expect(t, c, "request")
}

func TestNetworkLandWaitsForTheFirstAnswer(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Hold()
	send(t, c, ack)
	ctx, cancel := context.WithTimeout(t.Context(), 3*muteFor)
	defer cancel()
	if err := n.Land(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Land without any answer: %v; want DeadlineExceeded", err)
	}
}

func TestNetworkSwallowsTheReplyAfterTheServerHasActed(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c, other := dial(t, n, e), dial(t, n, e)
	send(t, c, "first")
	expect(t, c, "first")
	swallowed := n.SwallowReply()
	select {
	case <-swallowed:
		t.Fatal("swallowed before there was a request")
	default:
	}
	send(t, c, "second")
	expectReset(t, c)
	expectReset(t, other)
	<-swallowed
	if !e.has("second") {
		t.Fatal("the server has not got the request")
	}
	again := dial(t, n, e)
	send(t, again, "third")
	expect(t, again, "third")
}

func TestNetworkCounts(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	named := n.Naming("invoice/42")
	c := dial(t, n, e)
	send(t, c, "lock invoice/42")
	expect(t, c, "lock invoice/42")
	send(t, c, "ping")
	expect(t, c, "ping")
	if got := n.Stats(); got.BytesUp != 19 || got.BytesDown != 19 || got.Requests != 2 || got.Dials != 1 || got.Open != 1 {
		t.Fatalf("got %+v", got)
	}
	if named() != 1 {
		t.Fatalf("%d requests name the key, want 1", named())
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if got := n.Stats(); got.Open != 0 {
		t.Fatalf("%d connections are open", got.Open)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("second Close: %v, want ErrClosed", err)
	}
}

func TestNetworkServerEndsTheConnection(t *testing.T) {
	t.Parallel()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	n := newNetwork(t)
	c, err := n.Dial(t.Context(), listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write([]byte("go away")); err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "go away" {
		t.Fatalf("read %q, %v; want the server's last words and an end", got, err)
	}
	within(t, "writes are refused", func() bool {
		_, err := c.Write([]byte("x"))
		return err != nil
	})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestNetworkWriteBlocksWhenTheWindowIsFull(t *testing.T) {
	t.Parallel()
	e, n := newEcho(t), newNetwork(t)
	c := dial(t, n, e)
	n.Cut()
	if err := c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	var err error
	for range 2*window/(1<<20) + 1 {
		if _, err = c.Write(make([]byte, 1<<20)); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("writing more than the window: %v; want a time-out", err)
	}
}
