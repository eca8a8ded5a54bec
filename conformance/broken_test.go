package conformance

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// faultyLocker keeps the contract but for one clause. A suite that passes it is broken itself.
type faultyLocker struct {
	name string
	rows []string // each must fail
	// How it is broken: at the server, or at the client's end of the link. Either is called once for a run of the
	// suite, so that it can keep a state, and the fault that it returns is put into each Locker.
	server, client func() fault
	forgets        bool                       // the last token, when the server restarts
	promises       func(*locker.Capabilities) // beyond those of an honest locker
}

// fault changes how a Locker answers.
type fault func(f *faulty)

// faulty is a Locker of which some methods are replaced.
type faulty struct {
	locker.Locker
	net      *Network
	acquire  func(context.Context, locker.Request) (locker.Lease, error)
	extend   func(context.Context, locker.Lease) (locker.Lease, error)
	release  func(context.Context, locker.Lease) error
	close    func()
	passes   func() bool // whether a wake-up gets through; the Network tells if it is nil
	promises func(*locker.Capabilities)
	opaque   bool // what the Locker inside knows of its waiters is not true any more
}

func with(l locker.Locker, net *Network, broken fault) locker.Locker {
	if broken == nil {
		return l
	}
	f := &faulty{Locker: l, net: net, acquire: l.Acquire, extend: l.Extend, release: l.Release, close: func() {}}
	broken(f)
	return f
}

func (f *faulty) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	return f.acquire(ctx, req)
}

func (f *faulty) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	return f.extend(ctx, lease)
}

func (f *faulty) Release(ctx context.Context, lease locker.Lease) error { return f.release(ctx, lease) }

func (f *faulty) Close() error {
	f.close()
	return f.Locker.Close()
}

func (f *faulty) Capabilities() locker.Capabilities {
	caps := f.Locker.Capabilities()
	if f.promises != nil {
		f.promises(&caps)
	}
	return caps
}

func (f *faulty) Unwrap() locker.Locker {
	if f.opaque {
		return nil
	}
	return f.Locker
}

// harness is a server of its own behind a network, with the fault in its place.
func (l faultyLocker) harness(t *testing.T) Harness {
	t.Helper()
	var server, client fault
	if l.server != nil {
		server = l.server()
	}
	if l.client != nil {
		client = l.client()
	}
	s := newMortal(l.forgets)
	return Harness{
		TTL: 500 * time.Millisecond,
		Open: func(_ context.Context, net *Network) (locker.Locker, error) {
			front := with(net.Wrap(with(s.connect(), net, server)), net, client)
			return with(front, net, func(f *faulty) { f.promises = l.promises }), nil
		},
		Expire: func(_ context.Context, lease locker.Lease) error {
			if !s.store().Expire(lease.Key) {
				return fmt.Errorf("nobody holds %q", lease.Key)
			}
			return nil
		},
		Server:    Server{Pause: s.pause, Resume: s.resume, Crash: s.restart, Restart: s.restart, Wipe: s.restart},
		Leftovers: s.leftovers,
		Artifacts: t.TempDir(),
	}
}

// rowsNamed finds rows of the suite.
func rowsNamed(t *testing.T, names ...string) []row {
	t.Helper()
	var found []row
	for _, r := range allRows() {
		if slices.Contains(names, r.name) {
			found = append(found, r)
		}
	}
	if len(found) != len(names) {
		t.Fatalf("the suite has not all of the rows %v", names)
	}
	return found
}

// TestMain lets more tests run at a time than there are processors: they spend their time in waiting.
func TestMain(m *testing.M) {
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = parallel.Value.Set("6")
	}
	os.Exit(m.Run())
}

// TestBrokenLockers runs the rows that are meant for each broken locker. Each of them must fail by what it sees,
// not by its watchdog, which would tell nobody what is broken.
func TestBrokenLockers(t *testing.T) {
	t.Parallel()
	for _, broken := range brokenLockers {
		t.Run(strings.ReplaceAll(broken.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			s := newTestSuite(t, broken.harness(t))
			s.runRows(t.Context(), rowsNamed(t, broken.rows...), func(r Result) {
				switch {
				case r.Outcome != Failed:
					t.Errorf("a locker with the fault %q has survived: %v", broken.name, r)
				case strings.Contains(r.Seen, "watchdog") || strings.Contains(r.Seen, "goroutines are left"):
					t.Errorf("a locker with the fault %q failed, but by hanging: %v", broken.name, r)
				default:
					t.Log(r)
				}
			})
		})
	}
}

// provenElsewhere are the rows that no broken locker fails, and why.
var provenElsewhere = map[string]string{
	"release-on-dead-ctx":  "a Locker gets no dead ctx from a Client: it is the Client that is checked",
	"holder-dies":          "needs a process on the same server: backends with a server run it",
	"process-pause":        "needs a process on the same server: backends with a server run it",
	"waiter-loses-session": "needs a server with sessions",
}

// TestEachRowHasFailed looks for rows that nobody has seen failing. The rows about the Network are seen failing by
// TestNetworkRowsFailWithoutTheNetwork.
func TestEachRowHasFailed(t *testing.T) {
	t.Parallel()
	proven := make(map[string]bool)
	for _, broken := range brokenLockers {
		for _, name := range broken.rows {
			proven[name] = true
		}
	}
	for name := range brokenClusters {
		proven[name] = true
	}
	for _, r := range networkRows {
		proven[r.name] = true
	}
	for _, r := range allRows() {
		switch _, elsewhere := provenElsewhere[r.name]; {
		case proven[r.name] && elsewhere:
			t.Errorf("row %q is failed by a broken locker, and need not be proven elsewhere", r.name)
		case !proven[r.name] && !elsewhere:
			t.Errorf("row %q is failed by no broken locker: can it fail?", r.name)
		}
	}
}

// TestMendedLockers runs the same rows on lockers without a fault: so it is the fault that fails them.
func TestMendedLockers(t *testing.T) {
	t.Parallel()
	for _, mended := range mendedLockers {
		t.Run(strings.ReplaceAll(mended.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			s := newTestSuite(t, mended.harness(t))
			s.runRows(t.Context(), rowsNamed(t, mended.rows...), func(r Result) {
				if r.Outcome != Passed {
					t.Error(r)
				}
			})
		})
	}
}

// TestTwoSuitesAtOnce runs two suites on one server: neither sees what the other does, even without prefixes.
func TestTwoSuitesAtOnce(t *testing.T) {
	t.Parallel()
	h := faultyLocker{}.harness(t)
	rows := rowsNamed(t, "exclusive", "keys-are-independent", "belief-windows", "tokens-increase", "fair", "dropped-locker")
	for _, name := range []string{"one", "two"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			newTestSuite(t, h).runRows(t.Context(), rows, func(r Result) {
				if r.Outcome != Passed {
					t.Error(r)
				}
			})
		})
	}
}
