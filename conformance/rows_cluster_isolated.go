package conformance

import (
	"context"
	"time"

	"github.com/fec20105/locker"
)

var isolatedRows = []row{
	{
		name: "leader-isolated",
		clause: "A leader that is cut off from the other members, while clients still reach it, extends nothing that its " +
			"successor gives away: the work is told before another can be granted the lock, and who has trust left for " +
			"an election goes on with the successor.",
		needs: needCluster | needLeader | needIsolate,
		hurts: true,
		run:   leaderIsolated,
	},
}

// isolate cuts a member off from the others, until rejoin or the end of the row.
func (t *trial) isolate(member int) (rejoin func()) {
	t.outside("Isolate of a member", func(ctx context.Context) error { return t.Cluster.Isolate(ctx, member) })
	isolated := true
	t.cleanup(func() {
		if isolated {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), 100*t.slack)
			defer cancel()
			if err := t.Cluster.Rejoin(ctx, member); err != nil {
				t.Errorf("the harness cannot undo Isolate of member %d: %v", member, err)
			}
		}
	})
	return func() {
		t.outside("Rejoin of a member", func(ctx context.Context) error { return t.Cluster.Rejoin(ctx, member) })
		isolated = false
	}
}

func leaderIsolated(t *trial) {
	m := t.members()
	observer, _ := t.open()
	long := 3*t.TTL + 3*t.Cluster.Election
	client, spy, _ := t.spied(locker.WithTTL(long))
	held := t.hold(client, t.key("held"))
	locks := make([]*watched, 10)
	nets := make([]*Network, len(locks))
	for i := range locks {
		var client *locker.Client
		client, nets[i] = t.client()
		locks[i] = t.hold(client, t.key(word(8)))
	}
	leader := m.leader()
	isolated := time.Now()
	rejoin := t.isolate(leader)
	t.pass(t.Cluster.Election + t.TTL/2) // another one leads by now, and trust is short
	if next := m.leader(); next == leader {
		t.Fatalf("the harness's Isolate has not cut off the leader: it leads still")
	}
	renewals := spy.renewals.Load()
	for _, net := range nets {
		net.Cut()
	}
	cut := time.Now()
	t.parallel(len(locks), func(i int) {
		next, granted := t.takeOverAnyway(observer, locks[i], cut.Add(t.freedByNext()))
		t.knew(locks[i], granted)
		if next.Token <= locks[i].Token() {
			t.Errorf("token %d follows %d, after the leader was cut off", next.Token, locks[i].Token())
		}
	})
	t.eventually(time.Until(isolated.Add(long)), "a lock is renewed under another leader", func() bool { return spy.renewals.Load() > renewals })
	rejoin()
	t.mustBeHeld(observer, held.Key())
	if err := held.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}
