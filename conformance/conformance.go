// Package conformance checks that a locker.Locker keeps its contract, also when the network fails, processes stop and
// the server dies. A backend's test is one call:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{
//			TTL: time.Second,
//			Open: func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
//				return mybackend.New(ctx, mybackend.Options{Dial: net.DialContext})
//			},
//		})
//	}
//
// Each property is a row with a stable name, which is also the name of its subtest. A row that fails prints the clause
// of the contract that was broken, the line that saw it, and what was seen. [Check] does the same without a test.
package conformance

import (
	"context"
	"os/exec"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// Harness is what the suite needs to know of a backend. Open is required; rows that need something else that is
// missing are skipped with the reason.
type Harness struct {
	// Open makes a Locker with connections of its own, as another process would. All its traffic goes through net:
	// give net.DialContext to the client library, or wrap a backend without a network with net.Wrap. Closing the
	// Locker closes its connections, those of a client library's client that Open made included.
	Open func(ctx context.Context, net *Network) (locker.Locker, error)
	// TTL is the shortest that the backend keeps precisely; 2 s if zero. The whole suite takes about 30 of them.
	TTL time.Duration
	// AtOnce is how many rows run at the same time; 16 if zero. With fewer the suite takes longer, and needs fewer
	// connections: each row opens up to ten Lockers.
	AtOnce int

	// Expire makes the server forget a lease now, behind its holder's back.
	Expire func(ctx context.Context, lease locker.Lease) error
	// EndWait ends what keeps the place of a waiting request at the server, such as its session, while the client
	// goes on waiting. Leave it out where nothing can end a waiter's place but the waiter.
	EndWait func(ctx context.Context, waiting locker.Request) error
	// Small opens a Locker like Open does, but with the fewest connections that the backend works with: one row
	// checks that waiters leave one for heartbeats. Leave it out where the number of connections cannot be chosen;
	// Open is used then.
	Small func(ctx context.Context, net *Network) (locker.Locker, error)
	// Server controls the server itself. Rows that need it run one at a time, after all others.
	Server Server
	// Cluster controls the members of a cluster. Rows that need it run like those that need Server.
	Cluster Cluster
	// Process makes a command that re-runs this program into Serve, on the same server: rows that kill or stop a
	// holder start it. It must not set Stdin or Stdout.
	Process func(ctx context.Context) *exec.Cmd
	// Leftovers lists what is on the server under the prefix of this harness: everything, and what never expires.
	Leftovers func(ctx context.Context) (all, immortal []string, err error)
	// SeedToken makes the server believe that key, which is free, was last granted with this token: one of the far
	// future, to see that it passes every layer unharmed. It must not change the tokens of other keys: leave it out
	// for a server that has one counter for all keys, whose other rows would get the future's tokens too.
	SeedToken func(ctx context.Context, key string, token uint64) error
	// Artifacts is an existing folder. A row that fails may leave a file there for people to look at, such as a drawn
	// history, and names it in its report. The system's temporary folder if "".
	Artifacts string
}

// Server controls a server. Each function returns when it is done; those that are nil cannot be done.
type Server struct {
	Pause   func(context.Context) error // stops it: connections are accepted and nothing is answered
	Resume  func(context.Context) error // ends a Pause
	Crash   func(context.Context) error // kills it and starts it again with the data that it had written
	Restart func(context.Context) error // stops it in good order and starts it again with its data
	Wipe    func(context.Context) error // kills it and starts it again without any data
	Kill    func(context.Context) error // kills it: it stays down until Start
	Start   func(context.Context) error // starts it again with its data
}

// TestingT is what Run needs of a *testing.T.
type TestingT[T any] interface {
	Run(name string, test func(T)) bool
	Context() context.Context
	Helper()
	Log(args ...any)
	Skip(args ...any)
	Error(args ...any)
	Fatal(args ...any)
}

// Run runs every row as a subtest of t, which is a *testing.T: TestConformance/exclusive. Its type is a parameter so
// that programs which call Check do not link package testing.
func Run[T TestingT[T]](t T, h Harness) {
	t.Helper()
	s, err := newSuite(t.Context(), h)
	if err != nil {
		t.Fatal(err)
		return
	}
	runRowsAsTests(t, s, allRows())
}

func runRowsAsTests[T TestingT[T]](t T, s *suite, rows []row) {
	t.Helper()
	run := func(r row) {
		t.Run(r.name, func(t T) {
			switch result := s.run(t.Context(), r); result.Outcome {
			case Failed:
				t.Error(result)
			case Skipped:
				t.Skip(result)
			case Passed:
				if result.Seen != "" {
					t.Log(result)
				}
			}
		})
	}
	func() {
		working.Lock()
		defer working.Unlock()
		work(rows, s.AtOnce, run)
	}()
	hurt(rows, run)
}

// working is held by the one suite of this test program that keeps the processors busy. Others may hurt their servers meanwhile.
var working sync.Mutex
