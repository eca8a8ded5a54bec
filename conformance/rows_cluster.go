package conformance

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

var clusterRows = []row{
	{
		name: "member-down",
		clause: "A cluster that loses one of its members, who does not lead, keeps its locks: they are renewed and " +
			"excluded, and others are granted and released.",
		needs: needCluster,
		hurts: true,
		run:   memberDown,
	},
	{
		name:   "member-paused",
		clause: "A member that accepts everything and answers nothing costs no lock, and no more than a moment of a call.",
		needs:  needCluster,
		hurts:  true,
		run:    memberPaused,
	},
	{
		name:   "leader-moved",
		clause: "When another member takes over in good order, locks stay held and tokens go on growing.",
		needs:  needCluster | needLeader | needMoveLeader,
		hurts:  true,
		run:    leaderMoved,
	},
	{
		name: "leader-crash",
		clause: "When the leader is killed, a lock with more trust left than an election takes stays held, and one that " +
			"nobody renews is told lost before another can be granted it: at the latest by twice its TTL and an election.",
		needs: needCluster | needLeader,
		hurts: true,
		run:   leaderCrash,
	},
	{
		name: "leader-paused",
		clause: "A leader that stops and goes on after another has taken over extends nothing that its successor " +
			"gives away: the work is told before another can be granted the lock; where EarlyFree says failover, by the " +
			"next heartbeat.",
		needs: needCluster | needLeader,
		hurts: true,
		run:   leaderPaused,
	},
	{
		name: "majority-down",
		clause: "With no majority nothing is granted and nothing extended: the work is told by the deadline, and " +
			"another is granted the lock only after that, when the members are back.",
		needs: needCluster | needMajority,
		hurts: true,
		run:   majorityDown,
	},
}

// members are the servers of a cluster as a row leaves them: in the end it puts all right again.
type members struct {
	t            *trial
	down, paused map[int]bool
}

func (t *trial) members() *members {
	m := &members{t: t, down: make(map[int]bool), paused: make(map[int]bool)}
	t.cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), 300*t.slack)
		defer cancel()
		for i := range m.paused {
			if err := t.Cluster.Members[i].Resume(ctx); err != nil {
				t.Errorf("the harness cannot resume member %d: %v", i, err)
			}
		}
		for i := range m.down {
			if err := t.Cluster.Members[i].Start(ctx); err != nil {
				t.Errorf("the harness cannot start member %d: %v", i, err)
			}
		}
	})
	return m
}

func (m *members) kill(i int) {
	m.t.outside("Kill of a member", m.t.Cluster.Members[i].Kill)
	m.down[i] = true
}

func (m *members) start(i int) {
	m.t.outside("Start of a member", m.t.Cluster.Members[i].Start)
	delete(m.down, i)
}

func (m *members) pause(i int) {
	m.t.outside("Pause of a member", m.t.Cluster.Members[i].Pause)
	m.paused[i] = true
}

func (m *members) resume(i int) {
	m.t.outside("Resume of a member", m.t.Cluster.Members[i].Resume)
	delete(m.paused, i)
}

// leader is the member that leads.
func (m *members) leader() (leader int) {
	m.t.outside("Leader", func(ctx context.Context) (err error) {
		leader, err = m.t.Cluster.Leader(ctx)
		return err
	})
	return leader
}

// others are the members that do not lead: all of them where none leads.
func (m *members) others() (followers []int) {
	leader := -1
	if m.t.Cluster.Leader != nil {
		leader = m.leader()
	}
	for i := range m.t.Cluster.Members {
		if i != leader {
			followers = append(followers, i)
		}
	}
	return followers
}

// minor are members that the others can do without, each by itself. Where none leads all are alike: two stand for them.
func (m *members) minor() []int {
	others := m.others()
	if m.t.Cluster.Leader == nil {
		return []int{others[0], others[len(others)-1]}
	}
	return others
}

// freedByNext is the time by which an abandoned key must be free when another leader took over: a new leader may give
// every lease its whole TTL again.
func (t *trial) freedByNext() time.Duration { return t.freed() + t.TTL + t.Cluster.Election }

// staysInService watches a lock for two TTLs, while other locks are taken and given up. Calls may be slow, but not fail.
func (t *trial) staysInService(lock *watched, spy *spy, client *locker.Client, observer locker.Locker) {
	token, renewals := lock.Token(), spy.renewals.Load()
	for end := time.Now().Add(2 * t.TTL); time.Now().Before(end); t.pass(t.TTL / 10) {
		t.mustBeHeld(observer, lock.Key())
		began := time.Now()
		other, err := client.Acquire(t.ctx, t.key("other"))
		if err != nil {
			t.Fatalf("acquire of a free key with most members up: %v", err)
		}
		if err := other.Release(t.ctx); err != nil {
			t.Fatalf("release with most members up: %v", err)
		}
		if took := time.Since(began); took > t.TTL+10*t.slack {
			t.Errorf("a lock was taken and given up in %v, with most members up", took)
		}
		if err := lock.Err(); err != nil {
			t.Fatalf("lost although most members are up: %v", err)
		}
	}
	if lock.Token() != token {
		t.Errorf("the token was %d and is %d", token, lock.Token())
	}
	if renewals = spy.renewals.Load() - renewals; renewals < 3 {
		t.Errorf("%d renewals in two TTLs, want 3 at least", renewals)
	}
}

func memberDown(t *trial) {
	m := t.members()
	client, spy, _ := t.spied()
	observer, _ := t.open()
	lock := t.hold(client, t.key("held"))
	for _, i := range m.minor() {
		m.kill(i)
		t.staysInService(lock, spy, client, observer)
		m.start(i)
	}
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}

func memberPaused(t *trial) {
	m := t.members()
	client, spy, _ := t.spied()
	observer, _ := t.open()
	lock := t.hold(client, t.key("held"))
	for _, i := range m.minor() {
		m.pause(i)
		t.staysInService(lock, spy, client, observer)
		m.resume(i)
	}
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}

func leaderMoved(t *trial) {
	m := t.members()
	client, spy, _ := t.spied()
	observer, _ := t.open()
	lock := t.hold(client, t.key("held"))
	var last uint64
	other := t.key("tokens")
	for range 3 {
		before := m.leader()
		t.outside("MoveLeader", t.Cluster.MoveLeader)
		if after := m.leader(); after == before {
			t.Fatalf("the harness's MoveLeader has not moved the leader: it is member %d still", after)
		}
		t.staysInService(lock, spy, client, observer)
		next := t.acquire(observer, other)
		if next.Token <= last {
			t.Errorf("token %d follows %d, after the leader was moved", next.Token, last)
		}
		last = next.Token
		t.release(observer, next)
	}
	if err := lock.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}

func leaderCrash(t *trial) {
	m := t.members()
	observer, _ := t.open()
	long := 3*t.TTL + 3*t.Cluster.Election
	client, spy, _ := t.spied(locker.WithTTL(long))
	held := t.hold(client, t.key("held"))
	silent, net := t.client()
	abandoned := t.hold(silent, t.key("abandoned"))
	net.Cut()

	leader := m.leader()
	killed := time.Now()
	m.kill(leader)
	renewals := spy.renewals.Load()
	next, granted := t.takeOverAnyway(observer, abandoned, killed.Add(t.freedByNext()))
	t.knew(abandoned, granted)
	if next.Token <= abandoned.Token() {
		t.Errorf("token %d follows %d, after the leader was killed", next.Token, abandoned.Token())
	}
	t.eventually(time.Until(killed.Add(long)), "the lock is renewed under another leader", func() bool { return spy.renewals.Load() > renewals })
	t.mustBeHeld(observer, held.Key())
	m.start(leader)
	if err := held.Release(t.ctx); err != nil {
		t.Errorf("release of a lock that was held all the time: %v", err)
	}
}

func leaderPaused(t *trial) {
	m := t.members()
	observer, _ := t.open()
	locks := make([]*watched, 10)
	nets := make([]*Network, len(locks))
	for i := range locks {
		var client *locker.Client
		client, nets[i] = t.client()
		locks[i] = t.hold(client, t.key(word(8)))
	}
	leader := m.leader()
	m.pause(leader)
	t.pass(t.Cluster.Election + t.TTL/2) // another one leads by now, and trust is short
	m.resume(leader)
	if t.caps.EarlyFree&locker.EarlyFreeFailover != 0 {
		t.evictedByFailover(observer, locks)
		return
	}
	// What was under way when the old leader stopped has been answered by now, if at all. From here on nobody renews.
	t.pass(t.TTL / 10)
	for _, net := range nets {
		net.Cut()
	}
	cut := time.Now()
	t.parallel(len(locks), func(i int) {
		_, granted := t.takeOverAnyway(observer, locks[i], cut.Add(t.freedByNext()))
		t.knew(locks[i], granted)
	})
}

// evictedByFailover fails the row if a lock was given to another, and its holder, whose link is alive, is not told by its next
// heartbeat.
func (t *trial) evictedByFailover(observer locker.Locker, locks []*watched) {
	evicted := make([]bool, len(locks))
	t.parallel(len(locks), func(i int) {
		lock := locks[i]
		for end := time.Now().Add(t.TTL); time.Now().Before(end) && lock.Err() == nil; t.pass(t.TTL / 20) {
			next, held := t.try(observer, lock.Key())
			if held {
				continue
			}
			evicted[i] = true
			if next.Token <= lock.Token() {
				t.Errorf("token %d follows %d, which was evicted by a failover", next.Token, lock.Token())
			}
			t.endsBy(lock, time.Now().Add(t.TTL/3+2*t.soon()))
			t.release(observer, next)
			return
		}
	})
	n := 0
	for i := range evicted {
		if evicted[i] {
			n++
		}
	}
	t.Logf("%d of %d locks were evicted by a leader that stopped and went on", n, len(locks))
}

func majorityDown(t *trial) {
	m := t.members()
	observer, _ := t.open()
	client, _ := t.client()
	lock := t.hold(client, t.key(""))
	t.pass(t.TTL / 3)
	all := m.others()
	most := all[:len(t.Cluster.Members)/2+1]
	for _, i := range most {
		m.kill(i)
	}
	for lock.Err() == nil {
		ctx, cancel := t.timeout(t.TTL / 10)
		if lease, err := observer.Acquire(ctx, t.request(lock.Key(), noWait)); err == nil {
			t.Fatalf("granted token %d by a minority, %v before the deadline of the holder", lease.Token, time.Until(lock.Deadline()))
		}
		cancel()
		t.pass(t.TTL / 50)
	}
	if reason := t.endsBy(lock, lock.Deadline().Add(t.slack)); reason != locker.ReasonExpired {
		t.Errorf("the holder was told %v, want %v", reason, locker.ReasonExpired)
	}
	ctx, cancel := t.timeout(t.TTL / 4)
	defer cancel()
	if lease, err := observer.Acquire(ctx, t.request(t.key("free"), noWait)); err == nil {
		t.Errorf("a minority has granted token %d of a free key", lease.Token)
	}

	// Members may serve only together. The row waits for those who are not needed any more, too: its end would end their start.
	var started sync.WaitGroup
	for _, i := range most[1:] {
		started.Go(func() { t.outside("Start of a member", t.Cluster.Members[i].Start) })
		delete(m.down, i)
	}
	defer started.Wait()
	m.start(most[0])
	next, granted := t.takeOverAnyway(observer, lock, time.Now().Add(t.freedByNext()))
	t.knew(lock, granted)
	if next.Token <= lock.Token() {
		t.Errorf("token %d follows %d, which was lost", next.Token, lock.Token())
	}
}

// takeOverAnyway asks for the key of a lock until the observer is granted it, although calls fail meanwhile. It fails the
// row if there is no grant by then.
func (t *trial) takeOverAnyway(observer locker.Locker, lock *watched, then time.Time) (lease locker.Lease, granted time.Time) {
	for {
		asked := time.Now()
		req := t.request(lock.Key(), noWait)
		ctx, cancel := t.timeout(t.TTL)
		lease, err := observer.Acquire(ctx, req)
		granted := time.Now()
		cancel()
		if err == nil {
			return lease, granted
		}
		if asked.After(then) {
			t.Fatalf("%q is not granted to another %v after the limit: %v", lock.Key(), asked.Sub(then), err)
		}
		if !errors.Is(err, locker.ErrHeld) {
			ctx, cancel := t.timeout(t.TTL)
			_ = observer.Release(ctx, locker.Lease{Key: req.Key, ID: req.ID}) // what fails now ends with its TTL
			cancel()
		}
		t.pass(t.TTL / 200)
	}
}
