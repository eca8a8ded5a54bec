package main

import (
	"context"
	"net/url"
	"time"

	"github.com/fec20105/locker"
)

// A system is a sort of server with the libraries that keep locks on it.
type system struct {
	name string
	// start starts a private server.
	start func(ctx context.Context) (rawURL string, stop func() error, err error)
	// watch looks at a server from outside of what is measured.
	watch func(ctx context.Context, rawURL string) (monitor, error)
	peers []peer
	// scenarios are its own; nil: those of all.
	scenarios []scenario
}

var systems = []system{redisSystem, etcdSystem, postgresSystem, redlockSystem}

func (sys system) runs() []scenario {
	if sys.scenarios != nil {
		return sys.scenarios
	}
	return scenarios
}

// monitor counts what a server sees of its clients.
type monitor interface {
	// connections counts the server's clients, the monitor's own included.
	connections(ctx context.Context) (int, error)
	// commands counts what clients ask of the server within span.
	commands(ctx context.Context, span time.Duration) (int64, error)
	close() error
}

// A peer is a library, or a bare sequence of server commands, behind the few lines that make it comparable.
type peer struct {
	name string
	// open makes a client with connections of its own, as one process would. Its locks have this TTL.
	open func(ctx context.Context, rawURL string, ttl time.Duration) (client, error)
	// floor peers do not wait for a lock that is held: they run only where nobody else wants it.
	floor bool
	// mute peers never tell that a lock was lost.
	mute bool
}

// client is what the scenarios need of a library.
type client interface {
	// lock waits for key and holds it under the library's own heartbeat, where it has one.
	lock(ctx context.Context, key string) (held, error)
	close() error
}

// held is one lock.
type held struct {
	unlock func() error
	lost   <-chan struct{} // closed when the library tells of a loss; nil for mute peers
}

const ours = "locker"

type lockerClient struct{ *locker.Client }

func openLocker(ctx context.Context, rawURL string, ttl time.Duration) (client, error) {
	c, err := locker.Open(ctx, rawURL, locker.WithTTL(ttl))
	return lockerClient{c}, err
}

func (c lockerClient) lock(ctx context.Context, key string) (held, error) {
	l, err := c.Acquire(ctx, key)
	if err != nil {
		return held{}, err
	}
	return held{func() error { return l.Release(ctx) }, l.Done()}, nil
}

func (c lockerClient) close() error { return c.Close() }

// hostOf is the first host of a server's URL.
func hostOf(rawURL string) (string, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return "", err
	}
	return u.Host, nil
}
