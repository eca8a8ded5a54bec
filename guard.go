package locker

import "sync"

// Guard makes something in this process's memory refuse writes under old fencing tokens. Backends have guards of their own
// for what their servers store. The zero value is ready; it is safe for concurrent use.
type Guard struct {
	mu     sync.Mutex
	newest map[string]*guarded
}

type guarded struct {
	mu    sync.Mutex
	token uint64
}

// Do runs write if token is not older than the newest that was seen for key, and answers ErrStaleToken, without running it, if it
// is. Writes of one key run one after the other, so none runs after a newer token was seen. The newest token is
// remembered for ever, also if write fails; its error is returned.
func (g *Guard) Do(key string, token uint64, write func() error) error {
	g.mu.Lock()
	if g.newest == nil {
		g.newest = make(map[string]*guarded)
	}
	k, ok := g.newest[key]
	if !ok {
		k = new(guarded)
		g.newest[key] = k
	}
	g.mu.Unlock()

	k.mu.Lock()
	defer k.mu.Unlock()
	if token < k.token {
		return &Error{Op: "guard", Key: key, Err: ErrStaleToken}
	}
	k.token = token
	return write()
}
