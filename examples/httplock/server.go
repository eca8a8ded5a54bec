package httplock

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// The answers of the server. An answer is one of these words and never only an HTTP status: a proxy on the way has
// statuses of its own, and a lock must not be believed lost because of one.
const (
	done      = "done"      // what was asked for is so now
	held      = "held"      // somebody else holds the key
	lost      = "lost"      // this request does not hold the key any more
	withdrawn = "withdrawn" // this request is over, and came too late
)

// call is the body of every request.
type call struct {
	Key, ID string
	Holder  string        `json:",omitempty"`
	Token   uint64        `json:",omitempty"` // zero in a clean-up
	TTL     time.Duration `json:",omitempty"` // of acquire and extend; how long a wait waits
}

// answer is the body of every reply.
type answer struct {
	Outcome   string
	Token     uint64        `json:",omitempty"` // of a grant
	Holder    string        `json:",omitempty"` // who holds the key
	Remaining time.Duration `json:",omitempty"` // until the holder's time is over
}

// remembered is how long the ID of a request that is over is known: a repeated release is answered like the first, and
// an acquire that comes after its own end is refused.
const remembered = 15 * time.Second

// Server is a lock server in memory, for every client that can speak HTTP. Each lock has a time of its own, which
// starts when a request to acquire or extend it is handled.
type Server struct {
	mux http.ServeMux

	mu    sync.Mutex
	token uint64           // the last one granted
	locks map[string]*lock // those that are held
	over  map[string]bool  // the IDs of requests that are over; true if the client ended them
}

// lock is one grant.
type lock struct {
	id, holder string
	token      uint64
	until      time.Time
	timer      *time.Timer
	freed      chan struct{} // closed when the key is free again
}

// NewServer makes a server on which nothing is held.
func NewServer() *Server {
	s := &Server{locks: make(map[string]*lock), over: make(map[string]bool)}
	s.handle("POST /acquire", s.acquire)
	s.handle("POST /extend", s.extend)
	s.handle("POST /release", s.release)
	s.mux.HandleFunc("POST /wait", s.wait)
	return s
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// handle makes one atomic step reachable: it gets the lock that is held now, or nil.
func (s *Server) handle(pattern string, step func(call, *lock) answer) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if c, ok := read(w, r); ok {
			s.mu.Lock()
			a := step(c, s.live(c.Key))
			s.mu.Unlock()
			write(w, a)
		}
	})
}

// acquire grants a key that is free. A repeated request finds its own grant and sets its timer again, because the
// client counts from the request that was answered.
func (s *Server) acquire(c call, l *lock) answer {
	if _, ok := s.over[c.ID]; ok {
		return answer{Outcome: withdrawn}
	}
	if l == nil {
		// Tokens begin at the time of day, so that they also grow over a restart, which forgets the last one.
		s.token = max(s.token+1, uint64(time.Now().UnixMicro()))
		l = &lock{id: c.ID, holder: c.Holder, token: s.token, freed: make(chan struct{})}
		l.timer = time.AfterFunc(c.TTL, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.live(c.Key)
		})
		s.locks[c.Key] = l
	}
	if l.id != c.ID {
		return answer{Outcome: held, Holder: l.holder, Remaining: time.Until(l.until)}
	}
	l.keep(c.TTL)
	return answer{Outcome: done, Token: l.token}
}

// extend gives a grant that still holds its key a fresh TTL.
func (s *Server) extend(c call, l *lock) answer {
	if l == nil || l.id != c.ID {
		return answer{Outcome: lost}
	}
	l.keep(c.TTL)
	return answer{Outcome: done}
}

// release frees a key that this very request holds. One that does not hold it has released it before, or has lost it; in
// a clean-up, which has no token, it may also be still on its way, and is refused when it comes.
func (s *Server) release(c call, l *lock) answer {
	switch {
	case l != nil && l.id == c.ID:
		s.free(c.Key, l, true)
	case c.Token == 0:
		s.end(c.ID, true)
	case !s.over[c.ID]:
		return answer{Outcome: lost}
	}
	return answer{Outcome: done}
}

// wait answers when the key is free, or after the given time. It grants nothing: a waiter that is gone gets no lock.
func (s *Server) wait(w http.ResponseWriter, r *http.Request) {
	c, ok := read(w, r)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), c.TTL)
	defer cancel()
	s.mu.Lock()
	l := s.live(c.Key)
	s.mu.Unlock()
	if l != nil {
		select {
		case <-l.freed:
		case <-ctx.Done():
		}
	}
	write(w, answer{Outcome: done})
}

// keep lets the lock live for ttl from now.
func (l *lock) keep(ttl time.Duration) {
	l.until = time.Now().Add(ttl)
	l.timer.Reset(ttl)
}

// live returns the lock that is held, after freeing it if its time is over.
func (s *Server) live(key string) *lock {
	l := s.locks[key]
	if l != nil && !time.Now().Before(l.until) {
		s.free(key, l, false)
		return nil
	}
	return l
}

// free ends a grant, and wakes those who wait.
func (s *Server) free(key string, l *lock, released bool) {
	l.timer.Stop()
	delete(s.locks, key)
	close(l.freed)
	s.end(l.id, released)
}

// end remembers for a while that a request is over.
func (s *Server) end(id string, released bool) {
	if _, known := s.over[id]; !known {
		time.AfterFunc(remembered, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.over, id)
		})
	}
	s.over[id] = s.over[id] || released
}

func read(w http.ResponseWriter, r *http.Request) (c call, ok bool) {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&c); err != nil {
		http.Error(w, "the body is not a call in JSON", http.StatusBadRequest)
		return c, false
	}
	return c, true
}

func write(w http.ResponseWriter, a answer) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // a client that is gone needs no answer
}
