package servertest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// EtcdCluster is several etcd members that keep one set of data.
type EtcdCluster struct {
	Members []*Server
	URL     string // what locker.Open takes: all members
}

// StartEtcdCluster starts a private cluster. The caller stops it.
func StartEtcdCluster(ctx context.Context, members int) (*EtcdCluster, error) {
	program, err := etcdProgram()
	if err != nil {
		return nil, err
	}
	peers := make([]int, members)
	for i := range peers {
		if peers[i], err = FreePort(ctx); err != nil {
			return nil, fmt.Errorf("servertest: start an etcd cluster: %w", err)
		}
	}
	c := &EtcdCluster{Members: make([]*Server, members)}
	errs := make([]error, members)
	var all sync.WaitGroup
	for i := range c.Members { // at once: none serves before most of them run
		all.Go(func() { c.Members[i], errs[i] = startEtcdMember(ctx, program, EtcdOptions{Private: true}, i, peers) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	addrs := make([]string, members)
	for i, m := range c.Members {
		addrs[i] = m.Addr
	}
	c.URL = "etcd://" + strings.Join(addrs, ",")
	return c, nil
}

// api is where a member answers.
func (c *EtcdCluster) api(i int) *etcdAPI { return &etcdAPI{scheme: "http", addr: c.Members[i].Addr} }

// Leader is the index of the member that leads, as the members say that answer; it waits until one does.
func (c *EtcdCluster) Leader(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		for i, m := range c.Members {
			if m.down() {
				continue
			}
			// A member that leads says so itself; one that was deposed may say so for a moment after a pause, and does
			// not serve then.
			if s, err := c.api(i).status(ctx); err == nil && s.Leader == s.Header.Member && c.api(i).healthy(ctx) == nil {
				return i, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("servertest: the etcd cluster has no leader: %w", ctx.Err())
		}
	}
}

// MoveLeader makes another member the leader, and returns when it is.
func (c *EtcdCluster) MoveLeader(ctx context.Context) error {
	from, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	for i := range c.Members {
		to := (from + 1 + i) % len(c.Members)
		if to == from || c.Members[to].down() {
			continue
		}
		s, err := c.api(to).status(ctx)
		if err != nil {
			return fmt.Errorf("servertest: move the leader of the etcd cluster: %w", err)
		}
		target := struct {
			ID string `json:"targetID"`
		}{s.Header.Member}
		if err := c.api(from).call(ctx, http.MethodPost, "/v3/maintenance/transfer-leadership", target, &struct{}{}); err != nil {
			return fmt.Errorf("servertest: move the leader of the etcd cluster: %w", err)
		}
		return nil
	}
	return errors.New("servertest: move the leader of the etcd cluster: no other member is up")
}

// Stop stops all members.
func (c *EtcdCluster) Stop() error {
	var errs []error
	for _, m := range c.Members {
		if m != nil {
			errs = append(errs, m.Stop())
		}
	}
	return errors.Join(errs...)
}

// down tells whether the server is killed or paused.
func (s *Server) down() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.remote != nil {
		return s.stopped || s.remote.Down()
	}
	return s.paused || s.stopped || s.current == nil || s.current.ended()
}

// Etcd is StartEtcd for a test: it stops the server at the test's end, shows its log if the test has failed, and skips
// the test where etcd is not installed.
func Etcd(tb testing.TB, opts EtcdOptions) *Server {
	tb.Helper()
	return use(tb, "etcd", func(ctx context.Context) (*Server, error) { return StartEtcd(ctx, opts) })
}

// EtcdThree is a cluster of three for a test, like Etcd.
func EtcdThree(tb testing.TB) *EtcdCluster {
	tb.Helper()
	c, err := StartEtcdCluster(tb.Context(), 3)
	if errors.Is(err, ErrMissing) {
		Skip(tb, "etcd", err.Error())
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		for _, m := range c.Members {
			if tb.Failed() {
				tb.Logf("the last words of the etcd member at %s:\n%s", m.Addr, m.Log())
			}
		}
		if err := c.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return c
}
