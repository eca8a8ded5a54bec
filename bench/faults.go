package main

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/url"
	"sync"
	"time"
)

// lost is how many locks a fault takes from their holder at once.
const lost = 10

// crash kills a process that holds locks.
func crash(ctx context.Context, b *bench, p peer) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	keys := make([]string, lost)
	for i := range keys {
		keys[i] = b.key()
	}
	w, err := b.worker(ctx, p, job{TTL: shortTTL, Keys: keys, Hold: true})
	if err != nil {
		return nil, err
	}
	defer w.stop()
	clients, closeAll, err := b.open(ctx, p, 1, shortTTL)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	if err := w.ready(); err != nil {
		return nil, err
	}
	var waits []<-chan grant
	for _, key := range keys {
		waits = append(waits, await(ctx, clients[0], key))
	}
	settle(ctx, shortTTL/2)
	killed := time.Now()
	w.stop()
	var gaps []float64
	for _, granted := range waits {
		g := <-granted
		if g.err != nil {
			return nil, g.err
		}
		gaps = append(gaps, g.at.Sub(killed).Seconds()/shortTTL.Seconds())
		if err := g.lock.unlock(); err != nil {
			return nil, err
		}
	}
	return []float64{percentile(gaps, 50)}, nil
}

// lossNotice cuts the link of a client that holds locks which others wait for.
func lossNotice(ctx context.Context, b *bench, p peer) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wire, err := newLink(ctx, b.url)
	if err != nil {
		return nil, err
	}
	defer wire.close()
	holder, err := p.open(ctx, wire.url, shortTTL)
	if err != nil {
		return nil, err
	}
	defer func() {
		wire.close() // or what it says at its end would wait for answers
		_ = holder.close()
	}()
	others, closeAll, err := b.open(ctx, p, 1, shortTTL)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	locks := make([]held, lost)
	waits := make([]<-chan grant, lost)
	for i := range locks {
		key := b.key()
		if locks[i], err = holder.lock(ctx, key); err != nil {
			return nil, err
		}
		waits[i] = await(ctx, others[0], key)
	}
	settle(ctx, shortTTL/2)
	cut := time.Now()
	wire.cut()
	told := make([]time.Time, lost)
	notices, enough := context.WithTimeout(ctx, 3*shortTTL)
	defer enough()
	var listening sync.WaitGroup
	for i, lock := range locks {
		listening.Go(func() {
			select {
			case <-lock.lost: // nil for those who never tell
				told[i] = time.Now()
			case <-notices.Done():
			}
		})
	}
	share, lead := math.NaN(), math.NaN()
	var grants []grant
	for _, granted := range waits {
		g := <-granted
		if g.err != nil {
			return nil, g.err
		}
		grants = append(grants, g)
	}
	if p.mute {
		enough()
	}
	listening.Wait()
	for i, g := range grants {
		if !told[i].IsZero() {
			after := told[i].Sub(cut).Seconds() / shortTTL.Seconds()
			before := float64(g.at.Sub(told[i])) / float64(time.Millisecond)
			if i == 0 {
				share, lead = after, before
			}
			share, lead = max(share, after), min(lead, before)
		}
		if err := g.lock.unlock(); err != nil {
			return nil, err
		}
	}
	return []float64{share, lead}, nil
}

// link is a way to the server that can be cut: then its connections stay open, and nothing passes.
type link struct {
	url    string
	listen net.Listener
	target string
	ctx    context.Context
	mu     sync.Mutex
	isCut  bool
	conns  []net.Conn
	work   sync.WaitGroup
}

func newLink(ctx context.Context, rawURL string) (*link, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	l := &link{ctx: ctx, target: u.Host}
	if l.listen, err = new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	u.Host = l.listen.Addr().String()
	l.url = u.String()
	l.work.Go(l.accept)
	return l, nil
}

func (l *link) accept() {
	for {
		client, err := l.listen.Accept()
		if err != nil {
			return
		}
		server, err := new(net.Dialer).DialContext(l.ctx, "tcp", l.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		l.mu.Lock()
		l.conns = append(l.conns, client, server)
		l.mu.Unlock()
		l.work.Go(func() { l.carry(client, server) })
		l.work.Go(func() { l.carry(server, client) })
	}
}

// carry passes on what is written, until the link is cut: then it only reads.
func (l *link) carry(to io.Writer, from io.ReadCloser) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		l.mu.Lock()
		isCut := l.isCut
		l.mu.Unlock()
		if !isCut && n > 0 {
			_, werr := to.Write(buffer[:n])
			err = errors.Join(err, werr)
		}
		if err != nil {
			return
		}
	}
}

func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isCut = true
}

func (l *link) close() {
	_ = l.listen.Close()
	l.mu.Lock()
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.mu.Unlock()
	l.work.Wait()
}
