package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// sentinelTimeout is how long a Sentinel may take for an answer.
const sentinelTimeout = 2 * time.Second

// sentinels know which server is the primary. go-redis has a client for them, too, but one Sentinel that hangs holds it up for ever:
// it asks them one after the other, and comes back to the same one first. Here all are asked at once, and the newest answer of
// most of them counts.
//
// Each is listened to as well, so that connections to a primary that was replaced are cut: one that is cut off from the others, but
// not from this program, would go on renewing locks that its successor gives away.
type sentinels struct {
	name    string // of the primary
	clients []*redis.Client
	dialer  *dialer // makes the connections to the primary

	mu        sync.Mutex
	latest    verdict
	listening int // to so many of them
	replicas  int // the most that any of them has told of
	closed    bool

	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	working sync.WaitGroup // added to under mu while not closed
}

// verdict is what a Sentinel says.
type verdict struct {
	primary string // address
	epoch   int64  // of two verdicts, that with the greater one is newer
	err     error
}

var errNoSuchPrimary = errors.New("knows no primary of that name")

func newSentinels(name string, clients []*redis.Client, dialer *dialer) *sentinels {
	s := &sentinels{name: name, clients: clients, dialer: dialer}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// spawn runs f, unless all is over.
func (s *sentinels) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.working.Go(f)
	}
	return !s.closed
}

// watch begins to listen.
func (s *sentinels) watch() {
	for _, client := range s.clients {
		s.spawn(func() {
			stayInformed(s.ctx, client, "+switch-master", pingInterval, func(msg any) { s.hear(client, msg) })
		})
	}
}

func (s *sentinels) hear(client *redis.Client, msg any) {
	switch msg := msg.(type) {
	case nil:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.listening--
	case *redis.Subscription: // something may have been said before
		s.spawn(func() {
			s.learn(s.ask(s.ctx, client))
		})
		s.mu.Lock()
		defer s.mu.Unlock()
		s.listening++
	case *redis.Message:
		if strings.HasPrefix(msg.Payload, s.name+" ") {
			s.spawn(func() { s.learn(s.ask(s.ctx, client)) })
		}
	}
}

// dial connects to the primary, whatever the address. While a Sentinel is listened to, it is not asked again for each connection.
func (s *sentinels) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	ctx, cancel := bounded(ctx, s.dialer.timeout)
	defer cancel()
	s.mu.Lock()
	told, listening := s.latest.primary, s.listening > 0
	s.mu.Unlock()
	var failed error
	if told != "" && listening {
		var conn net.Conn
		if conn, failed = s.dialer.connect(ctx, network, told); failed == nil || ctx.Err() != nil {
			return conn, failed
		}
	}
	addr, err := s.find(ctx)
	switch {
	case err != nil:
		return nil, errors.Join(failed, err)
	case failed != nil && addr == told:
		return nil, failed
	}
	return s.dialer.connect(ctx, network, addr)
}

// find asks who is the primary. It waits for most of the Sentinels, and a moment for the others if those know less than was known
// before. A minority is believed if no more answer: clients that are cut off together with it would be of no use otherwise.
func (s *sentinels) find(ctx context.Context) (addr string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	verdicts := make(chan verdict, len(s.clients))
	for _, client := range s.clients {
		if !s.spawn(func() { verdicts <- s.ask(ctx, client) }) {
			return "", redis.ErrClosed
		}
	}
	var newest verdict
	var errs []error
	var late <-chan time.Time
	for good := 0; good+len(errs) < len(s.clients); {
		select {
		case v := <-verdicts:
			if v.err != nil {
				errs = append(errs, v.err)
				continue
			}
			if good++; good == 1 {
				timer := time.NewTimer(straggle)
				defer timer.Stop()
				late = timer.C
			}
			if good == 1 || v.epoch > newest.epoch {
				newest = v
			}
			if good > len(s.clients)/2 && s.learn(newest) {
				return newest.primary, nil
			}
			continue
		case <-late:
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
		}
		break
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case newest.primary == "":
		return "", s.failed(errs)
	case len(errs) == 0 && ctx.Err() == nil && newest.epoch < s.latest.epoch:
		s.adopt(newest) // all say so: they have been set up anew
	case newest.epoch >= s.latest.epoch:
		s.adopt(newest)
	}
	return s.latest.primary, nil
}

// learn takes in a verdict, and reports whether it is not older than what is known.
func (s *sentinels) learn(v verdict) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.err != nil || v.epoch < s.latest.epoch {
		return false
	}
	s.adopt(v)
	return true
}

// adopt is called with mu held.
func (s *sentinels) adopt(v verdict) {
	if s.latest.primary != v.primary {
		s.dialer.allow(v.primary)
	}
	s.latest = v
}

// failed makes one error of the Sentinels' own.
func (s *sentinels) failed(errs []error) error {
	for _, err := range errs {
		if errors.Is(err, errNoSuchPrimary) {
			return fmt.Errorf("no Sentinel that answers knows a primary named %q: check the URL's path", s.name)
		}
	}
	return fmt.Errorf("no Sentinel tells which server is the primary: %w", errors.Join(errs...))
}

// ask asks one Sentinel.
func (s *sentinels) ask(ctx context.Context, client *redis.Client) (v verdict) {
	ctx, cancel := bounded(ctx, sentinelTimeout)
	defer cancel()
	pipe := client.Pipeline()
	addr := redis.NewStringSliceCmd(ctx, "sentinel", "get-master-addr-by-name", s.name)
	known := redis.NewMapStringStringCmd(ctx, "sentinel", "master", s.name)
	_ = pipe.Process(ctx, addr)
	_ = pipe.Process(ctx, known)
	_, err := pipe.Exec(ctx)
	pair, addrErr := addr.Result()
	switch {
	case errors.Is(addrErr, redis.Nil):
		return verdict{err: errNoSuchPrimary}
	case addrErr != nil:
		err = addrErr
	case len(pair) == 2: // the rest may be forbidden to this user
		err = nil
	}
	if err != nil {
		return verdict{err: fmt.Errorf("%s: %w", client.Options().Addr, explainSentinel(err))}
	}
	v.primary = net.JoinHostPort(pair[0], pair[1])
	v.epoch, _ = strconv.ParseInt(known.Val()["config-epoch"], 10, 64)
	if n, err := strconv.Atoi(known.Val()["num-slaves"]); err == nil {
		s.mu.Lock()
		s.replicas = max(s.replicas, n)
		s.mu.Unlock()
	}
	return v
}

// explainSentinel says what to do about an error that is not the fault of Redis' own password.
func explainSentinel(err error) error {
	for _, sign := range []string{"NOAUTH", "WRONGPASS", "NOPERM"} {
		if strings.Contains(err.Error(), sign) {
			return fmt.Errorf("the Sentinel wants another user or password: give them as parameters sentinel_user and sentinel_password: %v", err) //nolint:errorlint // its text would be explained once more
		}
	}
	if isTimeout(err) {
		return fmt.Errorf("the Sentinel did not answer within %v", sentinelTimeout)
	}
	return err
}

// known is how many replicas the primary has, as the Sentinels say.
func (s *sentinels) known() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.replicas
}

// close ends everything that was started. What waits for a Sentinel ends when the connections to it are closed, by then.
func (s *sentinels) close(closeConnections func()) {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	closeConnections()
	s.working.Wait()
}
