package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// group is a cluster of three in memory. Its members share a store; what a real cluster would make of their faults is up to
// the faults of the group.
type group struct {
	broken groupFault

	mu     sync.Mutex
	store  *membackend.Store
	minor  *membackend.Store // what members that are alone grant, if they are so broken
	down   [3]bool
	paused [3]bool
	alone  [3]bool // cut off from the others
	leader int
}

// groupFault is how a cluster is broken.
type groupFault struct {
	forgetsWithMember bool // a member takes its locks with it
	asksThePaused     bool // a call to a member that stands still is not made to another
	forgetsWhenMoved  bool // a new leader begins without locks
	forgetsInCrash    bool // the same, but only if the old one was killed
	forgetsInPause    bool // or stood still
	forgetsCutOff     bool // or was cut off from the others
	servesAlone       bool // a minority grants what it does not know to be held
}

func newGroup(broken groupFault) *group {
	return &group{broken: broken, store: membackend.NewStore(), minor: membackend.NewStore()}
}

// change sets a state; the leader moves to a member that serves.
func (g *group) change(set func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	set()
	for i := 0; i < 3 && (g.down[g.leader] || g.paused[g.leader] || g.alone[g.leader]); i++ {
		g.leader = (g.leader + 1) % 3
	}
}

// forget takes all locks away if the group is so broken, and their holders learn of it when they renew. Tokens go on.
func (g *group) forget(really bool) {
	if really {
		for _, h := range g.store.Holdings() {
			g.store.Expire(h.Key)
		}
	}
}

func (g *group) member(i int) Server {
	return Server{
		Kill: func(context.Context) error {
			g.change(func() {
				g.forget(g.broken.forgetsWithMember && g.leader != i || g.broken.forgetsInCrash && g.leader == i)
				g.down[i] = true
			})
			return nil
		},
		Start: func(context.Context) error { g.change(func() { g.down[i] = false }); return nil },
		Pause: func(context.Context) error {
			g.change(func() {
				g.forget(g.broken.forgetsInPause && g.leader == i)
				g.paused[i] = true
			})
			return nil
		},
		Resume: func(context.Context) error { g.change(func() { g.paused[i] = false }); return nil },
	}
}

// cluster is what the harness gets.
func (g *group) cluster() Cluster {
	return Cluster{
		Members: []Server{g.member(0), g.member(1), g.member(2)},
		Leader: func(context.Context) (int, error) {
			g.mu.Lock()
			defer g.mu.Unlock()
			return g.leader, nil
		},
		MoveLeader: func(context.Context) error {
			g.change(func() {
				g.forget(g.broken.forgetsWhenMoved)
				g.leader = (g.leader + 1) % 3
			})
			return nil
		},
		Isolate: func(_ context.Context, i int) error {
			g.change(func() {
				g.forget(g.broken.forgetsCutOff && g.leader == i)
				g.alone[i] = true
			})
			return nil
		},
		Rejoin:   func(_ context.Context, i int) error { g.change(func() { g.alone[i] = false }); return nil },
		Election: 100 * time.Millisecond,
	}
}

var (
	errNoMajority = errors.New("most members are down")
	errNoAnswer   = errors.New("the member that was asked stands still")
)

// serving is the store that answers now.
func (g *group) serving() (*membackend.Store, error) {
	g.mu.Lock()
	up := 0
	for i := range g.down {
		if !g.down[i] && !g.paused[i] && !g.alone[i] {
			up++
		}
	}
	stuck := g.broken.asksThePaused && (g.paused[0] || g.paused[1] || g.paused[2])
	g.mu.Unlock()
	switch {
	case stuck:
		return nil, errNoAnswer
	case up >= 2:
		return g.store, nil
	case g.broken.servesAlone:
		return g.minor, nil
	default:
		return nil, errNoMajority
	}
}

// groupClient is one client of a group.
type groupClient struct {
	group *group
	name  string
}

func (c *groupClient) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	store, err := c.group.serving()
	if err != nil {
		return locker.Lease{}, &locker.Error{Op: "acquire", Key: req.Key, Backend: c.name, Err: err}
	}
	return store.Locker().Acquire(ctx, req)
}

func (c *groupClient) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	store, err := c.group.serving()
	if err == nil && store == c.group.minor {
		err = errNoMajority
	}
	if err != nil {
		return lease, &locker.Error{Op: "extend", Key: lease.Key, Backend: c.name, Err: err}
	}
	return store.Locker().Extend(ctx, lease)
}

func (c *groupClient) Release(ctx context.Context, lease locker.Lease) error {
	store, err := c.group.serving()
	if err != nil {
		return &locker.Error{Op: "release", Key: lease.Key, Backend: c.name, Err: err}
	}
	return store.Locker().Release(ctx, lease)
}

func (c *groupClient) Capabilities() locker.Capabilities {
	caps := c.group.store.Locker().Capabilities()
	caps.Backend = c.name
	caps.ReportsLoss = false
	return caps
}

func (c *groupClient) Close() error { return nil }

func groupHarness(broken groupFault) Harness {
	g := newGroup(broken)
	return Harness{
		TTL: 500 * time.Millisecond,
		Open: func(_ context.Context, net *Network) (locker.Locker, error) {
			return net.Wrap(&groupClient{group: g, name: "group"}), nil
		},
		Cluster: g.cluster(),
	}
}

// brokenClusters are the rows for clusters, each with a fault that it must find.
var brokenClusters = map[string]groupFault{
	"member-down":     {forgetsWithMember: true},
	"member-paused":   {asksThePaused: true},
	"leader-moved":    {forgetsWhenMoved: true},
	"leader-crash":    {forgetsInCrash: true},
	"leader-paused":   {forgetsInPause: true},
	"leader-isolated": {forgetsCutOff: true},
	"majority-down":   {servesAlone: true},
}

// TestBrokenClusters runs each row for clusters on a cluster that is broken, on which it must fail, and on one that is not.
func TestBrokenClusters(t *testing.T) {
	t.Parallel()
	for name, fault := range brokenClusters {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, broken := range []bool{true, false} {
				t.Run(fmt.Sprint("broken=", broken), func(t *testing.T) {
					t.Parallel()
					var f groupFault
					want := Passed
					if broken {
						f, want = fault, Failed
					}
					newTestSuite(t, groupHarness(f)).runRows(t.Context(), rowsNamed(t, name), func(r Result) {
						switch {
						case r.Outcome != want:
							t.Errorf("it %v, but should have %v: %v", r.Outcome, want, r)
						case strings.Contains(r.Seen, "watchdog"):
							t.Errorf("it failed, but by hanging: %v", r)
						default:
							t.Log(r)
						}
					})
				})
			}
		})
	}
}
