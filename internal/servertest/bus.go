package servertest

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"
)

// bus carries what the members of a Redis Cluster tell each other, so that one of them can be cut off. Each member reaches the others
// by a door, and comes from an address of its own.
type bus struct {
	mu      sync.Mutex
	away    map[int]bool
	doors   []net.Listener
	links   map[net.Conn][2]int // between which members
	carried sync.WaitGroup
}

func newBus() *bus { return &bus{away: make(map[int]bool), links: make(map[net.Conn][2]int)} }

// comesFrom is the address from which a member connects to the others.
func comesFrom(member int) string { return "127.0.1." + strconv.Itoa(member+1) }

// door opens one to a member that listens at a port, and returns the port at which the others find it.
func (b *bus) door(ctx context.Context, member, port int) (int, error) {
	var l net.Listener
	var found int
	for l == nil { // somebody else may find the same port
		var err error
		if found, err = FreePort(ctx); err != nil {
			return 0, err
		}
		l, err = new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(found)))
		if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			return 0, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.doors = append(b.doors, l)
	b.carried.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			b.carried.Go(func() { b.carry(conn, member, port) })
		}
	})
	return found, nil
}

// carry carries one link until either side ends it, or it is cut.
func (b *bus) carry(from net.Conn, member, port int) {
	defer from.Close()
	host, _, _ := net.SplitHostPort(from.RemoteAddr().String())
	other, _ := strconv.Atoi(host[len("127.0.1."):])
	to, err := new(net.Dialer).DialContext(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return
	}
	defer to.Close()
	b.mu.Lock()
	cut := b.away[member] || b.away[other-1]
	if !cut {
		b.links[from] = [2]int{member, other - 1}
	}
	b.mu.Unlock()
	if cut {
		return
	}
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1]) // however it ends, the other way ends too
			_ = from.Close()
			_ = to.Close()
		})
	}
	both.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.links, from)
}

// isolate cuts a member off, or lets it in again.
func (b *bus) isolate(member int, away bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.away[member] = away
	for link, ends := range b.links {
		if away && (ends[0] == member || ends[1] == member) {
			_ = link.Close() // carry ends the other side
		}
	}
}

func (b *bus) close() {
	b.mu.Lock()
	for _, l := range b.doors {
		_ = l.Close()
	}
	for link := range b.links {
		_ = link.Close()
	}
	b.mu.Unlock()
	b.carried.Wait()
}
