package conformance

import (
	"context"
	"time"
)

// Cluster controls several servers that keep one set of locks together, so that some of them may fail.
type Cluster struct {
	// Members are the servers, three at least: each needs Pause, Resume, Kill and Start.
	Members []Server
	// Leader tells which of Members leads, and waits until one does. Leave it out where none is more than the others.
	Leader func(context.Context) (int, error)
	// MoveLeader makes another member the leader, in good order.
	MoveLeader func(context.Context) error
	// Asynchronous says that the leader grants locks alone, and that others copy them later: no majority is needed then.
	Asynchronous bool
	// Isolate cuts a member off from the others, and not from clients: it does what it can alone. Rejoin undoes it.
	// Leave them out where the network cannot be parted, and where only tokens protect from a leader that is cut off.
	Isolate, Rejoin func(ctx context.Context, member int) error
	// Election is how long the members take at most until another one leads after the leader has failed.
	Election time.Duration
}

// complete tells whether the rows for clusters can be run.
func (c Cluster) complete() bool {
	for _, m := range c.Members {
		if m.Pause == nil || m.Resume == nil || m.Kill == nil || m.Start == nil {
			return false
		}
	}
	return len(c.Members) >= 3
}
