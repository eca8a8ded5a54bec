package main

import (
	"context"
	"fmt"
	"syscall"
	"time"
)

// bench is one run against one server.
type bench struct {
	system  system
	url     string
	monitor monitor
	quick   bool
	run     int64 // makes keys of different runs on one server differ
	keys    int
}

// key is a name that no scenario has used before.
func (b *bench) key() string {
	b.keys++
	return fmt.Sprintf("bench/%d/%d", b.run, b.keys)
}

// small is how many of something a load has.
func (b *bench) small(full, quick int) int {
	if b.quick {
		return min(full, quick)
	}
	return full
}

// short is how long a load lasts.
func (b *bench) short(full time.Duration) time.Duration {
	if b.quick {
		return min(full, 200*time.Millisecond)
	}
	return full
}

// open makes n clients of a peer, and a function that closes them.
func (b *bench) open(ctx context.Context, p peer, n int, ttl time.Duration) ([]client, func(), error) {
	var clients []client
	closeAll := func() {
		for _, c := range clients {
			_ = c.close() // what a peer says at its end is not measured
		}
	}
	for range n {
		c, err := p.open(ctx, b.url, ttl)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		clients = append(clients, c)
	}
	return clients, closeAll, nil
}

// processorTime is what this process has used.
func processorTime() time.Duration {
	var used syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
