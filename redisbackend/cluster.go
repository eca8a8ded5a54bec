package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fec20105/locker"
)

const (
	slotCount = 16384
	// askedAtOnce is how many servers are asked who has which slots.
	askedAtOnce = 5
	// mapTimeout is how long one of them may take.
	mapTimeout = time.Second
	// maxHops is how often a call is sent on because a server has named another one.
	maxHops = 16
	// A call that no server can serve at the moment is repeated after a while that doubles.
	firstPause, longestPause = 5 * time.Millisecond, 100 * time.Millisecond
)

// shards carries calls to the servers of a Redis Cluster: each to the one that has the slot of its key. go-redis' own client for
// clusters does that, too, but a batch of it waits for the slowest server, so that one which hangs would hold up the heartbeats of
// all locks; and it sends a WAIT to any server. Here each server has a pipeline of its own.
//
// What a server answers instead of a result, because slots are being moved or a replica has taken over, is dealt with here: callers
// see only that it took a moment longer, unless their time is over before.
type shards struct {
	settings *redis.Options // for each of the servers
	create   func(*redis.Options) *redis.Client
	given    func(context.Context) ([]redis.ClusterSlot, error) // tells who has which slots; if nil, the servers are asked
	replicas int

	mu        sync.Mutex
	nodes     map[string]*shard // by address. One that has left the cluster stays, without work
	seeds     []string
	slots     [slotCount]*shard
	primaries []*shard
	copies    int   // the most replicas that a primary has
	epoch     int64 // of the cluster, when that was so
	loading   bool
	loaded    time.Time
	turn      int
	closed    bool

	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	working sync.WaitGroup // added to under mu while not closed
}

// shard is one of the servers.
type shard struct {
	addr     string
	client   *redis.Client
	pipeline *pipeline
}

func newShards(seeds []string, settings *redis.Options, replicas int) *shards {
	s := &shards{settings: settings, create: redis.NewClient, replicas: replicas, seeds: seeds, nodes: make(map[string]*shard)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// clusterOf makes shards with the settings of a client that the program has.
func clusterOf(client *redis.ClusterClient, replicas int) *shards {
	theirs := client.Options()
	settings := &redis.Options{
		ClientName: theirs.ClientName, Dialer: theirs.Dialer, OnConnect: theirs.OnConnect, Protocol: theirs.Protocol,
		Username: theirs.Username, Password: theirs.Password,
		CredentialsProvider: theirs.CredentialsProvider, CredentialsProviderContext: theirs.CredentialsProviderContext,
		DialTimeout: theirs.DialTimeout, PoolFIFO: theirs.PoolFIFO, PoolSize: max(theirs.PoolSize, 2), PoolTimeout: theirs.PoolTimeout,
		MaxIdleConns: theirs.MaxIdleConns, MaxActiveConns: theirs.MaxActiveConns,
		ConnMaxIdleTime: theirs.ConnMaxIdleTime, ConnMaxLifetime: theirs.ConnMaxLifetime,
		TLSConfig: theirs.TLSConfig, DisableIdentity: theirs.DisableIdentity, IdentitySuffix: theirs.IdentitySuffix,

		MaxRetries: -1, ContextTimeoutEnabled: true, ReadTimeout: maxPatience, WriteTimeout: maxPatience,
	}
	s := newShards(theirs.Addrs, settings, replicas)
	s.create, s.given = theirs.NewClient, theirs.ClusterSlots
	return s
}

// node is the server at an address. It is called with mu held.
func (s *shards) node(addr string) *shard {
	n := s.nodes[addr]
	if n == nil {
		own := *s.settings
		own.Addr = addr
		n = &shard{addr: addr, client: s.create(&own)}
		n.pipeline = newPipeline(n.client, true, max(1, min(maxBatches, own.PoolSize-1)), s.replicas)
		n.pipeline.redirect = func(c *call) bool { return s.redirect(n, c) }
		s.nodes[addr] = n
		if s.closed {
			n.pipeline.close()
		}
	}
	return n
}

// of is the server to which calls for a key go, as far as is known.
func (s *shards) of(key string) *shard {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.slots[slotOf(key)]; n != nil {
		return n
	}
	return s.anyone() // who knows better, or will say that nobody has the slot
}

// anyone is one primary after the other. It is called with mu held.
func (s *shards) anyone() *shard {
	s.turn++
	if len(s.primaries) > 0 {
		return s.primaries[s.turn%len(s.primaries)]
	}
	return s.node(s.seeds[s.turn%len(s.seeds)])
}

// way is how a call has gone from server to server.
type way struct {
	start  *pipeline // where it began
	args   []any     // its own
	asking bool      // the server is to look although it does not have the slot yet
	hops   int       // since the latest pause
	pauses int
	end    time.Time // until then it may be repeated
}

func (c *call) asks() bool { return c.way != nil && c.way.asking }

// ask makes a call one for a server that gets the slot, or not any more. While a slot is being moved, the queue of a lock may still be
// where it was: so a request does not enter it, or there would be two that could not be put together.
func (c *call) ask(asking bool) {
	c.way.asking, c.args = asking, c.way.args
	if asking && c.script.sha == acquireScript.sha {
		c.args = append(slices.Clone(c.args[:5]), "once")
	}
}

func (s *shards) starts(c *call) *pipeline {
	p := s.of(c.key).pipeline
	if p.hangs() {
		s.refresh() // for the next try
	}
	c.way = &way{start: p, args: c.args}
	return p
}

func (s *shards) do(ctx context.Context, c *call) error     { return s.starts(c).do(ctx, c) }
func (s *shards) queued(ctx context.Context, c *call) error { return s.starts(c).queued(ctx, c) }
func (s *shards) begin(ctx context.Context, c *call) error  { return s.starts(c).begin(ctx, c) }
func (s *shards) finish(ctx context.Context, c *call) error { return c.way.start.finish(ctx, c) }

// Subscribe listens at any of the servers: what is published at one is told to all.
func (s *shards) Subscribe(ctx context.Context, channels ...string) *redis.PubSub {
	s.mu.Lock()
	client := s.anyone().client
	s.mu.Unlock()
	return client.Subscribe(ctx, channels...)
}

// redirect takes over a call that a server has not served, if another one may.
func (s *shards) redirect(from *shard, c *call) bool {
	if c.dropped.Load() || s.ctx.Err() != nil {
		return false
	}
	kind, rest, _ := strings.Cut(c.err.Error(), " ")
	switch {
	case kind == "MOVED" || kind == "ASK":
		number, addr, _ := strings.Cut(rest, " ")
		slot, err := strconv.Atoi(number)
		if addr = complete(addr, from.addr); err != nil || addr == "" || slot < 0 || slot >= slotCount {
			return false
		}
		if c.way.hops++; c.way.hops > maxHops {
			return s.later(c)
		}
		s.mu.Lock()
		to := s.node(addr)
		if kind == "MOVED" {
			s.slots[slot] = to
		}
		s.mu.Unlock()
		if kind == "MOVED" {
			s.refresh()
		}
		c.ask(kind == "ASK")
		return to.pipeline.requeue(c)
	case unserved(c.err):
		s.refresh()
		return s.later(c)
	case isNetwork(c.err):
		s.refresh() // it may be gone
	}
	return false
}

// unserved tells errors of calls that have changed nothing and may be served in a moment. Half of a slot that is being moved is on
// either server: a script that finds a key of its lock missing cannot know whether it is on the other one.
func unserved(err error) bool {
	for _, sign := range []string{"CLUSTERDOWN", "TRYAGAIN", "READONLY", "MASTERDOWN", "LOADING", "NOREPLICAS"} {
		if redis.HasErrorPrefix(err, sign) {
			return true
		}
	}
	if strings.Contains(err.Error(), "non local key") {
		return true
	}
	// A server that is gone, or a connection that has ended since it was used last: in a cluster each server has idle ones. What has
	// been written halfway may be repeated like everything.
	var network *net.OpError
	return errors.As(err, &network) && (network.Op == "dial" || network.Op == "write") && !network.Timeout()
}

// later repeats a call after a while, on the server that has its slot then, if there is time left.
func (s *shards) later(c *call) bool {
	w := c.way
	pause := min(firstPause<<min(w.pauses, 10), longestPause)
	pause = pause/2 + rand.N(pause/2)
	if w.end.IsZero() {
		w.end = time.Now().Add(defaultPatience)
		if !c.deadline.IsZero() && c.deadline.Before(w.end) {
			w.end = c.deadline
		}
	}
	if time.Now().Add(pause).After(w.end) {
		return false
	}
	w.pauses++
	w.hops = 0
	c.ask(false)
	time.AfterFunc(pause, func() {
		if !s.of(c.key).pipeline.requeue(c) {
			c.err = locker.ErrClosed
			c.finished()
		}
	})
	return true
}

// complete adds the host to an address without one: it is that of the server which named it.
func complete(addr, origin string) string {
	if host, port, err := net.SplitHostPort(addr); err == nil && host == "" {
		host, _, _ = net.SplitHostPort(origin)
		return net.JoinHostPort(host, port)
	}
	return addr
}

// refresh finds out in the background who has which slots now, but not all the time.
func (s *shards) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.loading || time.Since(s.loaded) < longestPause {
		return
	}
	s.loading = true
	s.working.Go(func() {
		_ = s.load(s.ctx) // those who call are told what is wrong
		s.mu.Lock()
		defer s.mu.Unlock()
		s.loading, s.loaded = false, time.Now()
	})
}

// clusterMap is what a server says about the cluster.
type clusterMap struct {
	slots []redis.ClusterSlot
	epoch int64
	state string
	from  string
	err   error
}

// load finds out who has which slots. Servers that hang or know nothing new hold nobody up.
func (s *shards) load(ctx context.Context) error {
	if s.given != nil {
		slots, err := s.given(ctx)
		if err == nil {
			s.adopt(clusterMap{slots: slots})
		}
		return err
	}
	s.mu.Lock()
	addrs := slices.Clone(s.seeds)
	for addr := range s.nodes {
		if !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	s.mu.Unlock()
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	var errs []error
	for some := range slices.Chunk(addrs, askedAtOnce) {
		newest, failed := s.survey(ctx, some)
		if newest.err == nil {
			s.adopt(newest)
			if newest.state != "ok" && newest.state != "" {
				return fmt.Errorf("the cluster is down (cluster_state:%s at %s): some slots have no server, or most servers cannot be reached", newest.state, newest.from)
			}
			return nil
		}
		if errs = append(errs, failed...); ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("no server of the cluster tells who has which keys: %w", errors.Join(errs...))
}

// survey asks some servers, and answers the newest of what most of them say.
func (s *shards) survey(ctx context.Context, addrs []string) (newest clusterMap, errs []error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	newest.err = redis.ErrClosed
	answers := make(chan clusterMap, len(addrs))
	s.mu.Lock()
	for _, addr := range addrs {
		if s.closed {
			answers <- clusterMap{err: redis.ErrClosed}
			continue
		}
		n := s.node(addr)
		s.working.Go(func() { answers <- n.clusterMap(ctx) })
	}
	s.mu.Unlock()
	var late <-chan time.Time
	for good := 0; good <= len(addrs)/2 && good+len(errs) < len(addrs); {
		select {
		case m := <-answers:
			if m.err != nil {
				errs = append(errs, m.err)
				continue
			}
			if good++; good == 1 {
				timer := time.NewTimer(straggle)
				defer timer.Stop()
				late = timer.C
			}
			if good == 1 || m.epoch > newest.epoch || m.epoch == newest.epoch && newest.state != "ok" {
				newest = m
			}
			continue
		case <-late:
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
		}
		break
	}
	return newest, errs
}

func (n *shard) clusterMap(ctx context.Context) (m clusterMap) {
	ctx, cancel := bounded(ctx, mapTimeout)
	defer cancel()
	pipe := n.client.Pipeline()
	info, slots := pipe.ClusterInfo(ctx), pipe.ClusterSlots(ctx)
	_, err := pipe.Exec(ctx)
	if slots.Err() != nil || len(slots.Val()) == 0 && err != nil {
		if isTimeout(err) {
			err = fmt.Errorf("the server did not answer within %v", mapTimeout)
		}
		return clusterMap{err: fmt.Errorf("%s: %w", n.addr, explain(err))}
	}
	m = clusterMap{slots: slots.Val(), state: field(info.Val(), "cluster_state"), from: n.addr}
	m.epoch, _ = strconv.ParseInt(field(info.Val(), "cluster_current_epoch"), 10, 64)
	return m
}

// adopt takes in a map, unless a newer one is known.
func (s *shards) adopt(m clusterMap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.epoch < s.epoch {
		return
	}
	s.epoch = m.epoch
	s.slots, s.primaries, s.copies = [slotCount]*shard{}, nil, 0
	for _, part := range m.slots {
		if len(part.Nodes) == 0 || part.Start < 0 || part.End >= slotCount {
			continue
		}
		n := s.node(complete(part.Nodes[0].Addr, m.from))
		if !slices.Contains(s.primaries, n) {
			s.primaries = append(s.primaries, n)
		}
		s.copies = max(s.copies, len(part.Nodes)-1)
		for slot := part.Start; slot <= part.End; slot++ {
			s.slots[slot] = n
		}
	}
}

// known is how many replicas a primary has at most.
func (s *shards) known() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.copies
}

// servers are all primaries.
func (s *shards) servers(ctx context.Context) ([]redis.Cmdable, error) {
	if err := s.load(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []redis.Cmdable
	for _, n := range s.primaries {
		all = append(all, n.client)
	}
	return all, nil
}

// close ends what is under way, but not the connections.
func (s *shards) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.cancel()
	for _, n := range s.nodes {
		n.pipeline.close()
	}
}

// closeClients closes the connections.
func (s *shards) closeClients() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, n := range s.nodes {
		errs = append(errs, n.client.Close())
	}
	return errors.Join(errs...)
}

func (s *shards) wait() {
	s.mu.Lock()
	nodes := slices.Collect(maps.Values(s.nodes)) // none is added any more that would have workers
	s.mu.Unlock()
	for _, n := range nodes {
		n.pipeline.wait()
	}
	s.working.Wait()
}

// slotOf is the slot of a lock's keys: that of what stands in braces in them.
func slotOf(key string) int {
	_, tag, _ := strings.Cut(key, "{")
	tag, _, _ = strings.Cut(tag, "}")
	crc := uint16(0)
	for i := range len(tag) {
		crc = crc<<8 ^ crcTable[byte(crc>>8)^tag[i]]
	}
	return int(crc % slotCount)
}

// crcTable is that of CRC-16/XMODEM.
var crcTable = func() (table [256]uint16) {
	for i := range table {
		crc := uint16(i) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
		table[i] = crc
	}
	return table
}()
