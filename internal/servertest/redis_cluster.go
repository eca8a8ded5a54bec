package servertest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// RedisCluster is a Redis Cluster: three primaries, each with a third of the slots and a replica.
type RedisCluster struct {
	Members []*Server
	URL     string // what locker.Open takes

	ids      []string // the names that the members have for each other
	password string
	bus      *bus
	doors    []int // by which the members find each other

	mu       sync.Mutex
	isolated map[*Server]bool
}

const (
	clusterPrimaries = 3
	// clusterNodeTimeout is how long a member may be silent, in milliseconds: a busy machine may keep it waiting.
	clusterNodeTimeout = 2000
	slotsOfCluster     = 16384
)

// StartRedisCluster starts a private cluster. The caller stops it.
func StartRedisCluster(ctx context.Context, password string) (*RedisCluster, error) {
	program, err := lookPath("apt-get install redis-server, brew install redis, or your system's package of Redis or Valkey",
		"redis-server", "valkey-server")
	if err != nil {
		return nil, err
	}
	c := &RedisCluster{
		Members: make([]*Server, 2*clusterPrimaries), ids: make([]string, 2*clusterPrimaries), doors: make([]int, 2*clusterPrimaries),
		password: password, bus: newBus(), isolated: make(map[*Server]bool),
	}
	errs := make([]error, len(c.Members))
	var all sync.WaitGroup
	for i := range c.Members {
		all.Go(func() {
			var err error
			const tries = 10
			for try := 1; ; try++ {
				var port int
				if port, err = FreePort(ctx); err == nil {
					c.doors[i], err = c.bus.door(ctx, i, port)
				}
				if err == nil {
					c.Members[i], err = startConfigured(ctx, program, password, clusterConfig(password, port, i, c.doors[i]))
				}
				// Between the choice of the port and the server's own listening somebody else may have taken it.
				if err == nil || isFree(ctx, port) || try == tries {
					break
				}
			}
			errs[i] = err
		})
	}
	all.Wait()
	err = errors.Join(errs...)
	if err == nil {
		err = c.join(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	addrs := make([]string, clusterPrimaries)
	for i := range addrs {
		addrs[i] = c.Members[i].Addr
	}
	user := ""
	if password != "" {
		user = ":" + password + "@"
	}
	c.URL = "redis+cluster://" + user + strings.Join(addrs, ",")
	return c, nil
}

func clusterConfig(password string, port, member, door int) func(folder string) string {
	plain := memberConfig(password, "")
	return func(folder string) string {
		// What a member knows of the others it keeps also without its data.
		return plain(folder) + fmt.Sprintf("cluster-enabled yes\ncluster-port %d\ncluster-config-file %s\ncluster-node-timeout %d\n"+
			"cluster-replica-validity-factor 0\ncluster-allow-replica-migration no\n"+
			"cluster-announce-ip 127.0.0.1\ncluster-announce-bus-port %d\nbind-source-addr %s\nprotected-mode no\n",
			port, filepath.Join(folder, "nodes.conf"), clusterNodeTimeout, door, comesFrom(member))
	}
}

// join makes a cluster of the members.
func (c *RedisCluster) join(ctx context.Context) error {
	share := slotsOfCluster / clusterPrimaries
	for i, m := range c.Members {
		id, err := m.ask(ctx, "CLUSTER", "MYID")
		if err != nil {
			return m.fail("join", err)
		}
		c.ids[i] = id.(string)
		commands := [][]string{{"CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i + 1)}}
		if i < clusterPrimaries {
			last := (i+1)*share - 1
			if i == clusterPrimaries-1 {
				last = slotsOfCluster - 1
			}
			commands = append(commands, []string{"CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(i * share), strconv.Itoa(last)})
		}
		for _, command := range commands {
			if _, err := m.ask(ctx, command...); err != nil {
				return m.fail("join", err)
			}
		}
	}
	for i, m := range c.Members {
		for j, other := range c.Members[:i] {
			if _, err := m.ask(ctx, "CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(other.port), strconv.Itoa(c.doors[j])); err != nil {
				return m.fail("join", err)
			}
		}
	}
	for i := clusterPrimaries; i < len(c.Members); i++ {
		m := c.Members[i]
		if err := eventually(ctx, "a member knows its primary", func(ctx context.Context) error {
			_, err := m.ask(ctx, "CLUSTER", "REPLICATE", c.ids[i-clusterPrimaries])
			return err
		}); err != nil {
			return err
		}
	}
	return c.Complete(ctx)
}

// Complete waits until all members that are up say that the cluster works, and every one of them is a primary with slots or
// a replica that has what its primary has.
func (c *RedisCluster) Complete(ctx context.Context) error {
	return eventually(ctx, "the cluster is complete", func(ctx context.Context) error {
		for i, m := range c.Members {
			if c.gone(m) {
				continue
			}
			info, err := m.ask(ctx, "CLUSTER", "INFO")
			if err != nil {
				return err
			}
			known := infoField(info, "cluster_known_nodes")
			if state := infoField(info, "cluster_state"); state != "ok" || known != strconv.Itoa(len(c.Members)) {
				return fmt.Errorf("member %d says %s, and knows %s members", i, state, known)
			}
			info, err = m.ask(ctx, "INFO", "replication")
			if err != nil {
				return err
			}
			if infoField(info, "role") == "slave" && infoField(info, "master_link_status") != "up" {
				return fmt.Errorf("member %d has not caught up", i)
			}
		}
		for slot := range clusterPrimaries { // all agree on who leads
			if _, err := c.owner(ctx, slot*slotsOfCluster/clusterPrimaries); err != nil {
				return err
			}
		}
		return nil
	})
}

// Owner is the index of the member that has a slot, as all members say that are up; it waits until they agree.
func (c *RedisCluster) Owner(ctx context.Context, slot int) (owner int, err error) {
	err = eventually(ctx, "all members agree who has a slot", func(ctx context.Context) (err error) {
		owner, err = c.owner(ctx, slot)
		return err
	})
	return owner, err
}

func (c *RedisCluster) owner(ctx context.Context, slot int) (int, error) {
	owner := -1
	for i, m := range c.Members {
		if c.gone(m) {
			continue
		}
		reply, err := m.ask(ctx, "CLUSTER", "SLOTS")
		if err != nil {
			return 0, err
		}
		one := -1
		for _, part := range reply.([]any) {
			p := part.([]any)
			if first, last := p[0].(int64), p[1].(int64); int64(slot) >= first && int64(slot) <= last {
				one = slices.Index(c.ids, p[2].([]any)[2].(string))
			}
		}
		switch {
		case one < 0 || c.gone(c.Members[one]):
			return 0, fmt.Errorf("member %d knows no member that is up and has slot %d", i, slot)
		case owner >= 0 && owner != one:
			return 0, fmt.Errorf("slot %d is said to be that of member %d, and of member %d", slot, owner, one)
		}
		owner = one
	}
	return owner, nil
}

// gone tells whether a member is down, or cannot be reached by the others.
func (c *RedisCluster) gone(m *Server) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.isolated[m] || m.down()
}

// Isolate takes a member away from all others, and from all clients but those that use its unix socket. It notices when it has not
// heard of the others for a while.
func (c *RedisCluster) Isolate(ctx context.Context, member int) error {
	m := c.Members[member]
	c.mu.Lock()
	c.isolated[m] = true
	c.mu.Unlock()
	c.bus.isolate(member, true)
	if err := m.hide(ctx); err != nil {
		return m.fail("isolate", err)
	}
	return nil
}

// Rejoin ends an isolation.
func (c *RedisCluster) Rejoin(ctx context.Context, member int) error {
	m := c.Members[member]
	if _, err := m.ask(ctx, "CONFIG", "SET", "bind", "127.0.0.1"); err != nil {
		return m.fail("rejoin", err)
	}
	c.bus.isolate(member, false)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.isolated, m)
	return nil
}

// Replica is the index of a member that is up and has a copy of what another one has.
func (c *RedisCluster) Replica(ctx context.Context, of int) (int, error) {
	for i, m := range c.Members {
		if c.gone(m) {
			continue
		}
		info, err := m.ask(ctx, "INFO", "replication")
		if err != nil {
			return 0, err
		}
		if infoField(info, "role") == "slave" && infoField(info, "master_port") == strconv.Itoa(c.Members[of].port) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("servertest: member %d has no replica", of)
}

// Failover makes the replica of a member the primary in its place, in good order, and returns when it is.
func (c *RedisCluster) Failover(ctx context.Context, of int) error {
	if err := c.Complete(ctx); err != nil {
		return err
	}
	to, err := c.Replica(ctx, of)
	if err != nil {
		return err
	}
	if _, err := c.Members[to].ask(ctx, "CLUSTER", "FAILOVER"); err != nil {
		return c.Members[to].fail("fail over to", err)
	}
	return eventually(ctx, "a replica has taken over", func(ctx context.Context) error {
		info, err := c.Members[to].ask(ctx, "INFO", "replication")
		if err == nil && infoField(info, "role") != "master" {
			err = errors.New("it has not")
		}
		if err == nil {
			err = c.Complete(ctx)
		}
		return err
	})
}

// SlotOf is the slot of a key.
func (c *RedisCluster) SlotOf(ctx context.Context, key string) (int, error) {
	slot, err := c.Members[0].ask(ctx, "CLUSTER", "KEYSLOT", key)
	if err != nil {
		return 0, err
	}
	return int(slot.(int64)), nil
}

// Resharding is a slot on its way from one primary to another.
type Resharding struct {
	cluster  *RedisCluster
	slot     string
	from, to int
}

// Reshard opens a slot for being moved: the server that has it answers ASK for keys that are not there, from now on.
func (c *RedisCluster) Reshard(ctx context.Context, slot, to int) (*Resharding, error) {
	from, err := c.Owner(ctx, slot)
	if err != nil {
		return nil, err
	}
	r := &Resharding{cluster: c, slot: strconv.Itoa(slot), from: from, to: to}
	if _, err := c.Members[to].ask(ctx, "CLUSTER", "SETSLOT", r.slot, "IMPORTING", c.ids[from]); err != nil {
		return nil, c.Members[to].fail("reshard to", err)
	}
	if _, err := c.Members[from].ask(ctx, "CLUSTER", "SETSLOT", r.slot, "MIGRATING", c.ids[to]); err != nil {
		return nil, c.Members[from].fail("reshard from", err)
	}
	return r, nil
}

// Move moves some keys of the slot, or all that there are.
func (r *Resharding) Move(ctx context.Context, keys ...string) error {
	from, to := r.cluster.Members[r.from], r.cluster.Members[r.to]
	if len(keys) == 0 {
		found, err := from.ask(ctx, "CLUSTER", "GETKEYSINSLOT", r.slot, "1000")
		if err != nil {
			return from.fail("reshard from", err)
		}
		for _, key := range found.([]any) {
			keys = append(keys, key.(string))
		}
	}
	if len(keys) == 0 {
		return nil
	}
	// Without REPLACE, as operators do it: a key that is on both sides is an error.
	command := []string{"MIGRATE", "127.0.0.1", strconv.Itoa(to.port), "", "0", "5000"}
	if r.cluster.password != "" {
		command = append(command, "AUTH", r.cluster.password)
	}
	if _, err := from.ask(ctx, append(append(command, "KEYS"), keys...)...); err != nil {
		return from.fail("reshard from", err)
	}
	return nil
}

// Finish moves what is left, and gives the slot to its new owner: the old one answers MOVED then.
func (r *Resharding) Finish(ctx context.Context) error {
	for {
		if err := r.Move(ctx); err != nil {
			return err
		}
		left, err := r.cluster.Members[r.from].ask(ctx, "CLUSTER", "COUNTKEYSINSLOT", r.slot)
		if err != nil {
			return r.cluster.Members[r.from].fail("reshard from", err)
		}
		if left == int64(0) {
			break
		}
	}
	for _, i := range []int{r.to, r.from} {
		if _, err := r.cluster.Members[i].ask(ctx, "CLUSTER", "SETSLOT", r.slot, "NODE", r.cluster.ids[r.to]); err != nil {
			return r.cluster.Members[i].fail("reshard", err)
		}
	}
	return nil
}

// Each does the same to all members, at the same time.
func (c *RedisCluster) Each(do func(*Server) error) error {
	return (&RedisGroup{Members: c.Members}).Each(do)
}

// Stop stops all members.
func (c *RedisCluster) Stop() error {
	err := (&RedisGroup{Members: c.Members}).Stop()
	c.bus.close()
	return err
}

// Cluster is a Redis Cluster for a test, as Redis is one server.
func Cluster(tb testing.TB, password string) *RedisCluster {
	tb.Helper()
	var c *RedisCluster
	useGroup(tb, func(ctx context.Context) (*RedisGroup, error) {
		var err error
		if c, err = StartRedisCluster(ctx, password); err != nil {
			return nil, err
		}
		tb.Cleanup(c.bus.close) // after the members
		return &RedisGroup{Members: c.Members}, nil
	})
	return c
}
