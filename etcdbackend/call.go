package etcdbackend

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/fec20105/locker"
)

const (
	// patience is how long one member may take before another is asked too.
	patience = 300 * time.Millisecond
	// electionPatience is for how long a cluster may be without a leader before a call fails.
	electionPatience = 5 * time.Second
	// mostHedges is how many members are asked at a time. The library takes them in turn, for all calls together, so that one
	// call may get the same member more than once.
	mostHedges = 10
	// connectionTries is how often a call is made that found no connection, or lost it.
	connectionTries = 4
)

// ask calls a server until it answers. The request must be one that can be repeated. A cluster that is electing its leader
// is asked again.
func ask[T any](ctx context.Context, b *Backend, call func(context.Context) (T, error)) (T, error) {
	began := time.Now()
	for try := 1; ; try++ {
		answer, err := hedge(ctx, b, call)
		err = rpctypes.Error(err)
		again := electing(err) && time.Since(began) < electionPatience || disconnected(err) && try < connectionTries
		if err == nil || !again || ctx.Err() != nil {
			return answer, err
		}
		pause := time.NewTimer(20*time.Millisecond<<min(try, 4)/2 + rand.N(20*time.Millisecond<<min(try, 4)))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return answer, err
		}
	}
}

// hedge makes a call, and once more to another member whenever one takes long: it may have stopped. The first good
// answer counts; the others are cancelled, and have ended when this returns: a request that is sent after its call would
// name a lock that is released.
func hedge[T any](ctx context.Context, b *Backend, call func(context.Context) (T, error)) (T, error) {
	if b.members() < 2 {
		return call(ctx)
	}
	type outcome struct {
		answer T
		err    error
	}
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	outcomes := make(chan outcome, mostHedges)
	begun, failed := 0, 0
	start := func() {
		begun++
		work.Go(func() {
			answer, err := call(ctx)
			outcomes <- outcome{answer, err}
		})
	}
	start()
	next := time.NewTimer(patience)
	defer next.Stop()
	for {
		select {
		case o := <-outcomes:
			if failed++; o.err == nil || failed == begun {
				return o.answer, o.err
			}
		case <-next.C:
			if begun < mostHedges && ctx.Err() == nil {
				start()
				next.Reset(patience)
			}
		}
	}
}

// electing tells whether an error says that the cluster has no leader at the moment. What the call asked for may have been done.
func electing(err error) bool {
	for _, e := range []error{
		rpctypes.ErrNoLeader, rpctypes.ErrLeaderChanged, rpctypes.ErrNotLeader, rpctypes.ErrTimeoutDueToLeaderFail,
		rpctypes.ErrTimeoutDueToConnectionLost, rpctypes.ErrTimeout,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// disconnected tells whether a call found no server, or lost it.
func disconnected(err error) bool {
	var known rpctypes.EtcdError
	return err != nil && !errors.As(err, &known) && status.Code(err) == codes.Unavailable
}

// refused tells whether an error is the servers' answer that they have not done what was asked, and will not.
func refused(err error) bool {
	var known rpctypes.EtcdError
	if !errors.As(err, &known) {
		return false
	}
	switch known.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown:
		return false
	default:
		return true
	}
}

// fail wraps the error of a call. ctx is the caller's.
func (b *Backend) fail(ctx context.Context, op, key string, err error) error {
	if b.ctx.Err() != nil || errors.Is(err, locker.ErrClosed) {
		return locker.ErrClosed
	}
	if _, deadline := ctx.Deadline(); deadline && ctx.Err() == nil && status.Code(err) == codes.DeadlineExceeded {
		<-ctx.Done() // the library's timer was a moment earlier
	}
	if over := ctx.Err(); over != nil {
		if !errors.Is(err, over) {
			err = fmt.Errorf("%w: %w", over, err)
		}
	} else {
		err = explain(err)
	}
	return &locker.Error{Op: op, Key: key, Backend: name, Err: err}
}

// hints says what to do about errors whose own text does not.
var hints = []struct{ sign, hint string }{
	{"database space exceeded", "the server's database is full: compact and defragment it, then disarm the alarm NOSPACE (etcdctl alarm disarm)"},
	{"user name is empty", "the server wants a user: give one in the URL, etcd://user:password@host"},
	{"invalid auth token", "the server wants a user, or has forgotten its login: give one in the URL, etcd://user:password@host"},
	{"authentication failed", "the server refuses this user or password"},
	{"permission denied", "the server's user lacks rights: locks need to read and write all keys that begin with the prefix"},
	{"certificate signed by unknown authority", "the server's certificate is of an authority that is not trusted: name it with the parameter ca"},
	{"failed to verify certificate", "the server's certificate does not fit: check the parameter ca and the host's name"},
	{"certificate required", "the server wants a certificate (parameters cert and key)"},
	{"bad certificate", "the server refuses or misses a certificate (parameters cert and key)"},
	{"first record does not look like a TLS handshake", "the server does not speak TLS: use etcd:// instead of etcds://"},
	{"authentication handshake failed", "nobody answers there who speaks TLS: check host and port, or use etcd:// instead of etcds://"},
	{"error reading server preface", "no etcd answers there: check host and port, and whether it wants TLS (etcds://)"},
	{"connection refused", "no server can be reached: check hosts and ports"},
	// A server that misses a certificate says so after the handshake, when the client may not listen any more.
	{"last connection error", "the server ends the connection: check host and port, and whether it wants a certificate (parameters cert and key)"},
}

// explain puts in front of an error what to do about it.
func explain(err error) error {
	for _, h := range hints {
		if strings.Contains(err.Error(), h.sign) {
			return fmt.Errorf("%s: %w", h.hint, err)
		}
	}
	return err
}
