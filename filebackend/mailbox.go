package filebackend

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/fec20105/locker"
)

// mailbox is a file by which other processes reach this Backend: they write the ID of a request there that was granted, or whose
// lock was taken away. It stays locked while the Backend lives, so that its death is seen at once. One file serves all
// locks and waits of a Backend, and nobody is woken for others.
type mailbox struct {
	folder     *folder
	stillHolds func(key, id string) bool

	mu       sync.Mutex
	file     *os.File // nil until it is needed
	watcher  *fsnotify.Watcher
	requests map[string]*addressee
	done     chan struct{} // closed when the watcher's goroutine has ended
	soon     *time.Timer   // starts the watch
	starting sync.WaitGroup
}

// A holder is not watched for before it has held for this long: to end a watch costs the kernel some 10 ms, which is
// much for a lock that is held for one.
const unwatchedAtFirst = 30 * time.Millisecond

// addressee is a request that waits, or holds a lock.
type addressee struct {
	req  locker.Request
	wake chan struct{} // has room for one
	held bool
	told bool // mail came before it was known to be held
}

const mailboxPrefix = "m-"

func newMailbox(f *folder, stillHolds func(key, id string) bool) *mailbox {
	return &mailbox{folder: f, stillHolds: stillHolds, requests: make(map[string]*addressee)}
}

// open makes the file if it is not there.
func (m *mailbox) open() (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.file != nil {
		if _, err := os.Stat(m.file.Name()); err == nil {
			return nil
		}
		// Deleted by hand: those who wait under the old name count as dead, and ask again.
		m.stop()
	}
	m.file, err = m.create()
	return err
}

// listen starts the watch. Without one, because the system has no more of them, waiters look more often.
func (m *mailbox) listen() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.file == nil || m.watcher != nil {
		return
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return
	}
	if err := watcher.Add(m.file.Name()); err != nil {
		_ = watcher.Close()
		return
	}
	m.watcher, m.done = watcher, make(chan struct{})
	go m.watch(watcher, m.file, m.done)
}

// listenSoon starts the watch a little later, unless the mailbox is closed before.
func (m *mailbox) listenSoon() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watcher != nil || m.soon != nil || m.file == nil {
		return
	}
	m.starting.Add(1)
	m.soon = time.AfterFunc(unwatchedAtFirst, func() {
		defer m.starting.Done()
		m.listen()
	})
}

// create makes a locked file. A sweep may remove it before it is locked.
func (m *mailbox) create() (*os.File, error) {
	for {
		path := filepath.Join(m.folder.boot, mailboxPrefix+strings.ToLower(rand.Text()))
		file, err := m.folder.make(path, os.O_RDWR|os.O_EXCL)
		if os.IsNotExist(err) {
			if err = m.folder.prepare(); err == nil {
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		locked, err := flock(file)
		if err == nil && locked {
			if _, err = os.Stat(path); err == nil {
				return file, nil
			}
		}
		_ = file.Close()
		if err != nil && !os.IsNotExist(err) {
			_ = os.Remove(path)
			return nil, err
		}
	}
}

// watch reads what comes until the watcher is closed.
func (m *mailbox) watch(watcher *fsnotify.Watcher, file *os.File, done chan<- struct{}) {
	defer close(done)
	var rest string
	buffer := make([]byte, 4096)
	for {
		for { // also at first: there may be mail from before the watch
			n, _ := file.Read(buffer) // at the end of the file there is no more
			if n == 0 {
				break
			}
			lines := strings.Split(rest+string(buffer[:n]), "\n")
			rest = lines[len(lines)-1]
			for _, id := range lines[:len(lines)-1] {
				m.to(id)
			}
		}
		m.empty(file)
		select {
		case _, ok := <-watcher.Events:
			if !ok {
				return
			}
		case _, ok := <-watcher.Errors: // events may be lost
			if !ok {
				return
			}
			m.toAll()
		}
	}
}

// empty keeps the file from growing for ever. What is written meanwhile may be lost, so all look.
func (m *mailbox) empty(file *os.File) {
	const most = 1 << 20
	if info, err := file.Stat(); err != nil || info.Size() < most {
		return
	}
	if file.Truncate(0) == nil {
		_, _ = file.Seek(0, 0)
		m.toAll()
	}
}

// to delivers mail to one request.
func (m *mailbox) to(id string) {
	m.mu.Lock()
	a := m.requests[id]
	if a == nil {
		m.mu.Unlock()
		return
	}
	a.told = true
	select {
	case a.wake <- struct{}{}:
	default:
	}
	held := a.held
	m.mu.Unlock()
	if held {
		m.look(id, a)
	}
}

func (m *mailbox) toAll() {
	m.mu.Lock()
	ids := make([]string, 0, len(m.requests))
	for id := range m.requests {
		ids = append(ids, id)
	}
	m.mu.Unlock()
	for _, id := range ids {
		m.to(id)
	}
}

// look tells the holder of a lock if it was taken away.
func (m *mailbox) look(id string, a *addressee) {
	if a.req.Lost == nil || m.stillHolds(a.req.Key, id) {
		return
	}
	m.mu.Lock()
	current := m.requests[id] == a
	if current {
		delete(m.requests, id)
	}
	m.mu.Unlock()
	if current {
		a.req.Lost(locker.ReasonTaken)
	}
}

func (m *mailbox) add(req locker.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[req.ID] = &addressee{req: req, wake: make(chan struct{}, 1)}
}

func (m *mailbox) remove(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.requests, id)
}

// granted notes that a request holds its lock, which mail may already have taken away again.
func (m *mailbox) granted(id string) {
	m.mu.Lock()
	a := m.requests[id]
	if a == nil {
		m.mu.Unlock()
		return
	}
	a.held = true
	told := a.told
	if a.req.Lost == nil {
		delete(m.requests, id)
	}
	m.mu.Unlock()
	if a.req.Lost != nil {
		m.listenSoon()
	}
	if told {
		m.look(id, a)
	}
}

// wake gets a value when the request has mail.
func (m *mailbox) wake(id string) <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.requests[id]; a != nil {
		return a.wake
	}
	return nil
}

// name is the file's name for those who write, or "".
func (m *mailbox) name() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.file == nil {
		return ""
	}
	return filepath.Base(m.file.Name())
}

func (m *mailbox) watched() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.watcher != nil
}

// stop ends the watch and removes the file. m.mu is held, but not while the goroutine ends, which may need it.
func (m *mailbox) stop() {
	watcher, file, done := m.watcher, m.file, m.done
	m.watcher, m.file, m.done = nil, nil, nil
	if m.soon != nil && m.soon.Stop() {
		m.starting.Done()
	}
	m.soon = nil
	m.mu.Unlock()
	defer m.mu.Lock()
	m.starting.Wait()
	if watcher != nil {
		_ = watcher.Close()
		<-done
	}
	if file != nil {
		_ = os.Remove(file.Name())
		_ = file.Close()
	}
}

func (m *mailbox) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stop()
	clear(m.requests)
	return nil
}
