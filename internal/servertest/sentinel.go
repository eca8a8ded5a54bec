package servertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// SentinelGroup is a Redis primary with its replicas, and the Sentinels that watch them and choose another primary when it fails.
type SentinelGroup struct {
	Members   []*Server // one of them is the primary
	Sentinels []*Server
	URL       string // what locker.Open takes

	mu       sync.Mutex
	isolated map[*Server]bool
}

// SentinelOptions asks for more than a plain group.
type SentinelOptions struct {
	Password         string // clients of Redis must give it
	SentinelPassword string // clients of the Sentinels must give it
}

// SentinelName is what the Sentinels call the primary.
const SentinelName = "primary"

// sentinelTimes make Sentinels quick: by default they look at a server every ten seconds, and stand still for half a minute
// after they were stopped for a while. They are not told to fail over sooner than a busy machine may keep a server waiting.
var sentinelTimes = []string{
	"info-period", "300", "ask-period", "100", "ping-period", "500", "min-link-reconnect-period", "100", "tilt-period", "100",
}

const (
	sentinelDownAfter = 2500 // in milliseconds
	sentinelFailover  = 2000 // the time for one failover: after one that came to nothing, twice as long passes until the next
)

// StartSentinelGroup starts a primary with two replicas, and three Sentinels. The caller stops them.
func StartSentinelGroup(ctx context.Context, opts SentinelOptions) (*SentinelGroup, error) {
	program, err := lookPath("apt-get install redis-server, brew install redis, or your system's package of Redis or Valkey",
		"redis-server", "valkey-server")
	if err != nil {
		return nil, err
	}
	g := &SentinelGroup{Members: make([]*Server, 3), Sentinels: make([]*Server, 3), isolated: make(map[*Server]bool)}
	if g.Members[0], err = startConfigured(ctx, program, opts.Password, memberConfig(opts.Password, "")); err != nil {
		return nil, errors.Join(err, g.Stop())
	}
	errs := make([]error, 6)
	var all sync.WaitGroup
	for i := 1; i < len(g.Members); i++ {
		all.Go(func() {
			g.Members[i], errs[i] = startConfigured(ctx, program, opts.Password, memberConfig(opts.Password, g.Members[0].Addr))
		})
	}
	for i := range g.Sentinels {
		all.Go(func() {
			config := sentinelConfig(opts, g.Members[0].Addr)
			g.Sentinels[i], errs[3+i] = startConfigured(ctx, program, opts.SentinelPassword, config, "--sentinel")
		})
	}
	all.Wait()
	err = errors.Join(errs...)
	if err == nil {
		err = g.ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, g.Stop())
	}
	addrs := make([]string, len(g.Sentinels))
	for i, s := range g.Sentinels {
		addrs[i] = s.Addr
	}
	u := url.URL{Scheme: "redis+sentinel", Host: strings.Join(addrs, ","), Path: "/" + SentinelName}
	if opts.Password != "" {
		u.User = url.UserPassword("", opts.Password)
	}
	if opts.SentinelPassword != "" {
		u.RawQuery = url.Values{"sentinel_password": {opts.SentinelPassword}}.Encode()
	}
	g.URL = u.String()
	return g, nil
}

// startConfigured starts a Redis or a Sentinel with a configuration that it may rewrite, as both do when a primary changes, and
// finds again when it comes back, even without its data.
func startConfigured(ctx context.Context, program, password string, config func(folder string) string, args ...string) (*Server, error) {
	k := kind{name: "redis"}
	k.prepare = func(folder string, port int) ([]string, error) {
		file := filepath.Join(folder, "redis.conf")
		command := append([]string{program, file}, args...)
		if _, err := os.Stat(file); err == nil {
			return command, nil
		}
		text := fmt.Sprintf("port %d\nbind 127.0.0.1\nunixsocket %s\ndir %s\n%s", port, redisSocket(folder), filepath.Join(folder, "data"), config(folder))
		if password != "" {
			text += "requirepass \"" + password + "\"\n"
		}
		return command, os.WriteFile(file, []byte(text), 0o600)
	}
	k.ready = func(ctx context.Context, folder string) error {
		err := pingRedis(ctx, "unix", redisSocket(folder), password)
		if err == nil && len(args) > 0 { // a Sentinel, which forgets this when it ends
			_, err = askRedis(ctx, "unix", redisSocket(folder), password, append([]string{"SENTINEL", "DEBUG"}, sentinelTimes...)...)
		}
		return err
	}
	s, err := start(ctx, k)
	if err != nil {
		return nil, err
	}
	u := url.URL{Scheme: "redis", Host: s.Addr}
	if password != "" {
		u.User = url.UserPassword("", password)
	}
	s.URL, s.Socket = u.String(), redisSocket(s.guard.folder)
	return s, nil
}

// memberConfig is that of a primary, or of the replica of one.
func memberConfig(password, primary string) func(folder string) string {
	return func(string) string {
		config := "save \"\"\nappendonly yes\nappendfsync no\n" + quickReplication
		if password != "" {
			config += "masterauth \"" + password + "\"\n"
		}
		if primary != "" {
			config += "replicaof " + strings.ReplaceAll(primary, ":", " ") + "\n"
		}
		return config
	}
}

// Without a time-out a primary that is told to end does so, whatever its replicas have heard.
const quickReplication = "shutdown-timeout 0\nrepl-diskless-sync yes\nrepl-diskless-sync-delay 0\nrepl-ping-replica-period 1\n"

func sentinelConfig(opts SentinelOptions, primary string) func(folder string) string {
	return func(string) string {
		host, port, _ := net.SplitHostPort(primary)
		config := fmt.Sprintf("sentinel monitor %s %s %s 2\n", SentinelName, host, port) +
			fmt.Sprintf("sentinel down-after-milliseconds %s %d\n", SentinelName, sentinelDownAfter) +
			fmt.Sprintf("sentinel failover-timeout %s %d\n", SentinelName, sentinelFailover)
		if opts.Password != "" {
			config += fmt.Sprintf("sentinel auth-pass %s %s\n", SentinelName, opts.Password)
		}
		if opts.SentinelPassword != "" {
			config += fmt.Sprintf("sentinel sentinel-pass %s\n", opts.SentinelPassword)
		}
		return config
	}
}

// ask asks a member or a Sentinel, over a socket that also an isolated one has.
func (s *Server) ask(ctx context.Context, command ...string) (any, error) {
	u, err := url.Parse(s.URL)
	if err != nil {
		return nil, err
	}
	password, _ := u.User.Password()
	return askRedis(ctx, "unix", s.Socket, password, command...)
}

// ready waits until all know each other, so that a failover is possible from now on.
func (g *SentinelGroup) ready(ctx context.Context) error {
	// Sentinels meet by what they publish. Four of these periods after a replica was promoted, those that have not heard of it
	// make it a replica again, and to hear of it takes a second.
	if err := g.publish(ctx, "100"); err != nil {
		return err
	}
	err := eventually(ctx, "the Sentinels know each other", func(ctx context.Context) error {
		for _, s := range g.Sentinels {
			reply, err := s.ask(ctx, "SENTINEL", "MASTER", SentinelName)
			if err != nil {
				return err
			}
			known := fields(reply)
			if known["num-slaves"] != strconv.Itoa(len(g.Members)-1) || known["num-other-sentinels"] != strconv.Itoa(len(g.Sentinels)-1) || known["flags"] != "master" {
				return fmt.Errorf("a Sentinel knows %s replicas and %s Sentinels, of a primary that is %s",
					known["num-slaves"], known["num-other-sentinels"], known["flags"])
			}
		}
		return nil
	})
	return errors.Join(err, g.Complete(ctx), g.publish(ctx, "500"))
}

// Complete waits until the primary has all other members that are up as replicas, which have what it has.
func (g *SentinelGroup) Complete(ctx context.Context) error {
	return eventually(ctx, "the Sentinel group is complete", func(ctx context.Context) error {
		_, err := g.led(ctx, len(g.Members)-1)
		return err
	})
}

func (g *SentinelGroup) publish(ctx context.Context, period string) error {
	for _, s := range g.Sentinels {
		if _, err := s.ask(ctx, "SENTINEL", "DEBUG", "publish-period", period); err != nil {
			return err
		}
	}
	return nil
}

// eventually polls until there is no error any more.
func eventually(ctx context.Context, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("servertest: waiting until %s: %w: %w", what, context.Cause(ctx), last)
		}
	}
}

// Primary is the index of the member that the Sentinels call the primary, and that says so itself; it waits until there is one
// with a replica, if another member is up.
func (g *SentinelGroup) Primary(ctx context.Context) (primary int, err error) {
	err = eventually(ctx, "there is a primary", func(ctx context.Context) (err error) {
		primary, err = g.led(ctx, 1)
		return err
	})
	return primary, err
}

func (g *SentinelGroup) led(ctx context.Context, least int) (int, error) {
	addr, err := g.named(ctx)
	if err != nil {
		return 0, err
	}
	for i, m := range g.Members {
		if m.Addr != addr {
			continue
		}
		if g.away(m) {
			return 0, fmt.Errorf("%s is down", addr)
		}
		info, err := m.ask(ctx, "INFO", "replication")
		switch {
		case err != nil:
			return 0, err
		case infoField(info, "role") != "master":
			return 0, fmt.Errorf("%s is no primary", addr)
		}
		up := 0
		for _, other := range g.Members {
			if other != m && !g.away(other) {
				up++
			}
		}
		if n := strings.Count(info.(string), "state=online"); n < min(up, least) {
			return 0, fmt.Errorf("%s has %d of %d replicas", addr, n, up)
		}
		return i, nil
	}
	return 0, fmt.Errorf("%s is no member", addr)
}

// away tells whether a member cannot be reached by the others.
func (g *SentinelGroup) away(m *Server) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.isolated[m] || m.down()
}

// named is the address on which all Sentinels that answer agree.
func (g *SentinelGroup) named(ctx context.Context) (addr string, err error) {
	for _, s := range g.Sentinels {
		if s.down() {
			continue
		}
		reply, err := s.ask(ctx, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SentinelName)
		if err != nil {
			return "", err
		}
		pair, ok := reply.([]any)
		if !ok || len(pair) != 2 {
			return "", fmt.Errorf("a Sentinel knows no primary: %v", reply)
		}
		one := net.JoinHostPort(fmt.Sprint(pair[0]), fmt.Sprint(pair[1]))
		if addr != "" && one != addr {
			return "", fmt.Errorf("the Sentinels name %s and %s", addr, one)
		}
		addr = one
	}
	if addr == "" {
		return "", errors.New("all Sentinels are down")
	}
	return addr, nil
}

// Failover makes another member the primary, in good order, and returns when it is and has a replica.
func (g *SentinelGroup) Failover(ctx context.Context) error {
	if err := g.Complete(ctx); err != nil {
		return err
	}
	from, err := g.Primary(ctx)
	if err != nil {
		return err
	}
	return eventually(ctx, "another member is the primary", func(ctx context.Context) error {
		now, err := g.led(ctx, 1)
		if err == nil && now != from {
			return nil
		}
		if err == nil { // may refuse for a while: the last failover was just now, or no replica is good enough yet
			_, err = g.Sentinels[0].ask(ctx, "SENTINEL", "FAILOVER", SentinelName)
		}
		if err == nil {
			err = errors.New("a failover is under way")
		}
		return err
	})
}

// Isolate takes a member away from all others, and from all clients but those that use its unix socket: their connections are cut,
// and it can no longer be reached by its address. It does not notice: Redis tells a primary nothing of that.
func (g *SentinelGroup) Isolate(ctx context.Context, member int) error {
	m := g.Members[member]
	if err := m.hide(ctx); err != nil {
		return m.fail("isolate", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.isolated[m] = true
	return nil
}

// hide makes a Redis listen where nobody looks for it, and ends all its connections.
func (s *Server) hide(ctx context.Context) error {
	for _, command := range [][]string{
		{"CONFIG", "SET", "bind", "127.255.255.254"},
		{"CLIENT", "KILL", "TYPE", "replica"},
		{"CLIENT", "KILL", "TYPE", "pubsub"},
		{"CLIENT", "KILL", "TYPE", "normal"},
	} {
		if _, err := s.ask(ctx, command...); err != nil {
			return err
		}
	}
	return nil
}

// Rejoin ends an isolation.
func (g *SentinelGroup) Rejoin(ctx context.Context, member int) error {
	m := g.Members[member]
	if _, err := m.ask(ctx, "CONFIG", "SET", "bind", "127.0.0.1"); err != nil {
		return m.fail("rejoin", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.isolated, m)
	return nil
}

// Each does the same to all members, at the same time.
func (g *SentinelGroup) Each(do func(*Server) error) error {
	return (&RedisGroup{Members: g.Members}).Each(do)
}

// Stop stops all members and Sentinels.
func (g *SentinelGroup) Stop() error {
	return (&RedisGroup{Members: append(append([]*Server(nil), g.Sentinels...), g.Members...)}).Stop()
}

// Sentinel is a group for a test, as Redis is one server.
func Sentinel(tb testing.TB, opts SentinelOptions) *SentinelGroup {
	tb.Helper()
	var g *SentinelGroup
	useGroup(tb, func(ctx context.Context) (*RedisGroup, error) {
		var err error
		if g, err = StartSentinelGroup(ctx, opts); err != nil {
			return nil, err
		}
		return &RedisGroup{Members: append(append([]*Server(nil), g.Members...), g.Sentinels...)}, nil
	})
	return g
}
