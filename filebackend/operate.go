package filebackend

import (
	"context"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// Inspect implements [locker.Inspector].
func (b *Backend) Inspect(ctx context.Context, key string) (locker.Holding, error) {
	if err := b.begin(ctx); err != nil {
		return locker.Holding{}, b.fail("inspect", key, err)
	}
	defer b.calls.RUnlock()
	s, err := b.folder.read(key)
	if err != nil {
		return locker.Holding{}, b.fail("inspect", key, err)
	}
	return b.holding(s), nil
}

func (b *Backend) holding(s *state) locker.Holding {
	h := locker.Holding{Key: s.Key}
	for _, e := range s.Queue {
		if b.folder.alive(e) {
			h.Waiters++
		}
	}
	if now := bootNow(); s.heldAt(now) {
		h.ID, h.Holder, h.Token = s.Holder.ID, s.Holder.Label, s.Holder.Token
		h.Since, h.Remaining = time.UnixMicro(s.Holder.Since), s.Holder.Until-now
	}
	return h
}

// Break implements [locker.Breaker]. The holder is told at once if its process runs.
func (b *Backend) Break(ctx context.Context, held locker.Holding) error {
	if err := b.begin(ctx); err != nil {
		return b.fail("break", held.Key, err)
	}
	defer b.calls.RUnlock()
	err := b.folder.change(ctx, held.Key, func(c *change) error {
		if c.state.Holder == nil || held.Token == 0 || c.state.Holder.Token != held.Token {
			return locker.ErrLost
		}
		c.wake = append(c.wake, c.state.Holder.entry)
		c.free()
		return nil
	})
	return b.fail("break", held.Key, err)
}

// List implements [locker.Lister].
func (b *Backend) List(ctx context.Context) iter.Seq2[locker.Holding, error] {
	return func(yield func(locker.Holding, error) bool) {
		fail := func(err error) { yield(locker.Holding{}, b.fail("list", "", err)) }
		if err := b.begin(ctx); err != nil {
			fail(err)
			return
		}
		defer b.calls.RUnlock()
		files, err := b.folder.stateFiles()
		if err != nil {
			fail(err)
			return
		}
		for _, path := range files {
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			s, err := load(path, "")
			if err != nil {
				fail(err)
				return
			}
			if h := b.holding(s); h.Token != 0 && !yield(h, nil) {
				return
			}
		}
	}
}

// stateFiles are the paths of all state files, sorted.
func (f *folder) stateFiles() ([]string, error) {
	entries, err := os.ReadDir(f.boot)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), statePrefix) && strings.HasSuffix(e.Name(), stateSuffix) {
			paths = append(paths, filepath.Join(f.boot, e.Name()))
		}
	}
	return paths, nil
}

// sweepEvery is how often what crashed processes left behind is looked for.
const sweepEvery = time.Minute

// sweeper removes what crashed processes left behind.
type sweeper struct {
	mu   sync.Mutex
	last time.Time
	work sync.WaitGroup
}

// sweepNow starts a sweep if no process of the folder has made one for a minute.
func (b *Backend) sweepNow() {
	s := &b.sweeper
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.last) < sweepEvery {
		return
	}
	s.last = time.Now()
	marker := filepath.Join(b.folder.boot, "swept")
	if info, err := os.Stat(marker); err == nil {
		if age := time.Since(info.ModTime()); 0 <= age && age < sweepEvery {
			return
		}
	}
	if err := b.folder.replace(marker, []byte("\n")); err != nil { // a byte, so that its time changes
		return // no room, and no right: later, or another process
	}
	s.work.Go(b.sweep)
}

// sweep removes the files of leases that have ended, of steps that were cut short, and of processes that have died.
func (b *Backend) sweep() {
	ctx, cancel := context.WithTimeout(context.Background(), sweepEvery)
	defer cancel()
	entries, _ := os.ReadDir(b.folder.boot)
	for _, e := range entries {
		select {
		case <-b.closed:
			return
		default:
		}
		path := filepath.Join(b.folder.boot, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), mailboxPrefix):
			removeDead(path)
		case !strings.HasPrefix(e.Name(), statePrefix):
		case strings.HasSuffix(e.Name(), tempSuffix):
			b.removeTemp(ctx, path)
		case strings.HasSuffix(e.Name(), stateSuffix):
			// A damaged file stays, and is reported to those who want that lock.
			if s, err := load(path, ""); err == nil && s.Key != "" && !s.heldAt(bootNow()) {
				_ = b.folder.change(ctx, s.Key, func(*change) error { return nil }) // settles it
			}
		}
	}
}

// removeDead removes the mailbox of a process that has died.
func removeDead(path string) {
	file, err := openFile(path, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer file.Close()
	if locked, err := flock(file); err == nil && locked {
		_ = os.Remove(path) // its owner, if it was about to lock it, sees that it is gone
	}
}

// removeTemp removes a file of a step that was cut short. Whoever has the stripe's lock knows that no step is under way.
func (b *Backend) removeTemp(ctx context.Context, path string) {
	stripe := b.folder.stripeOf(hashIn(filepath.Base(path)))
	if err := stripe.lock(ctx); err != nil {
		return
	}
	defer stripe.unlock()
	_ = os.Remove(path)
}
