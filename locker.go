package locker

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"
	"unicode/utf8"
)

// Locker grants leases on named locks. Each backend implements it, and Client turns it into locks that renew
// themselves, know their deadline and tell the work when they are lost. A Locker knows its server and nothing of
// heartbeats, queues or programs. Programs that only want a lock use [Client] and never call these methods.
//
// A Locker MUST be safe for concurrent use. Package conformance checks every MUST on this page, by name, against a
// running server, and injects the faults that the rules speak of: a backend that passes it keeps this contract.
//
// # Start before send
//
// A lease is trusted from Lease.Start to Start + TTL less a safety margin, however late the answer came. Start MUST
// be read before the sending of the last successful request that refreshed the server timer which will free this
// lock, and of no other request. An earlier moment is always safe, so retries inside one call do no harm; the moment of
// an answer never is. On a server that keeps a time for each lock the request that counts is the granting or
// extending one itself. Where the timer belongs to a server-side session or lease, only what restarts that timer
// counts (measured in spikes on PostgreSQL 15 and etcd 3.7):
//
//   - etcd: the grant of the server lease, or a keepalive. A transaction that confirms the key, even one that puts it
//     again, refreshes nothing: a waiter that counted from it, with a TTL of 9 s and a keepalive 3 s old, believed for
//     2.7 s in a key that another client had been granted.
//   - PostgreSQL: the session's idle timer starts at the end of a wait in pg_advisory_lock, which the client learns
//     late, on a link of 300 ms 299 ms too late. So the moment before a short statement that is sent after the
//     wait's answer, and that is answered too.
//
// Where lock and timer are two things at the server, Extend refreshes the timer first and then confirms the lock, and
// Release decides by the lock: a live timer says nothing of a lock that was broken. Start stays that of the refresh.
//
// # Every grant is its own owner
//
// Two Acquires through one Locker MUST exclude each other exactly like two processes do, although many servers let
// one session take the same lock twice. A lease MUST end on its own TTL although a heartbeat for another lock keeps
// a shared session alive: the backend frees it itself, and says in Capabilities.Expiry how much later it is freed
// when the client dies unnoticed. No request of an Acquire may reach the server before the timer that will undo it.
// What keeps a waiter's place alive is the backend's work; what keeps a grant alive is the caller's.
//
// # ctx bounds the call, not the hold
//
// A ctx that ends stops the call; it MUST NOT end the lease that the call returned, nor a connection that other
// leases live on. A call whose ctx is already done sends nothing. A call returns soon after its ctx ends, also when
// the server hangs; what it has sent may still take effect, so an Extend that ended thus makes the lease last
// longer than anybody believes, never shorter.
//
// # Errors
//
// ErrHeld, ErrLost, ErrClosed and errors.ErrUnsupported are matched with errors.Is; everything else comes in an
// *Error. A call that ended because of its ctx MUST match the ctx's error, although many client libraries report a
// plain network time-out then. A broken connection is an unknown outcome, not ErrLost, unless the server itself says
// that the lease has ended, if need be over another connection. No error may print a password.
//
// # Unwrap
//
// A Locker that wraps another and leaves keys and leases as they are SHOULD have a method Unwrap() Locker, through
// which [As] finds the optional interfaces ([Inspector], [Lister], [Breaker]). One that changes keys MUST NOT have
// it, and implements those interfaces itself.
type Locker interface {
	// Acquire waits until req.Key is granted to req.ID, ctx ends, or the backend fails. With req.NoWait it asks the
	// server once and answers ErrHeld, best as a *HeldError, if somebody else holds the key or waits for it.
	//
	// A grant's Token MUST be greater than that of every earlier grant of the key, as far as
	// Capabilities.Fencing reaches. A backend may grant a longer TTL than requested, never a shorter one.
	//
	// Acquire is idempotent by req.ID: a retried request MUST NOT be granted twice or stand in the queue twice, and
	// one that reaches the server after its own release or withdrawal (see Release) MUST neither be granted nor queued.
	//
	// A waiter whose place at the server is gone (its session died, its server forgot it) MUST return an error or
	// queue again; it MUST NOT be granted the lock by the dead place.
	//
	// A wait that ends with ctx matches ctx's error, and ErrHeld too if the wait had learned that the key was held.
	// After any error but a plain ErrHeld the key may be held or the request queued: the caller then calls
	// Release(Lease{Key, ID}) until it is answered, or leaves it to expire. Client does this for its callers. Acquire
	// never answers ErrLost: nothing was granted.
	Acquire(ctx context.Context, req Request) (Lease, error)

	// Extend gives a lease that is still held a fresh lease.TTL and returns it with its new Start. It has three
	// outcomes: nil, the lease is extended; ErrLost, it is definitely not held any more; any other error, unknown.
	// Unknown neither ends nor extends a lease: its deadline does.
	//
	// It MUST NOT take back a lease that the server has freed, even if nobody else took the key meanwhile, nor
	// touch a successor's. Key, ID and Token never change, TTL only if the server grants another.
	//
	// Extends of one lease may overlap and be answered in any order; the later Start counts. A backend with one
	// connection for a lease may let them share one request; Start is then that request's. Callers ignore an answer
	// that comes after the deadline that stood when they asked: servers may answer at the very moment of expiry.
	Extend(ctx context.Context, lease Lease) (Lease, error)

	// Release gives the lock up if, and only if, this very grant (Key and ID) still holds it. Its outcomes are those
	// of Extend: nil, the server has freed it; ErrLost, this grant held it no more; any other error, unknown.
	//
	// A repeated Release MUST answer nil like the first, for as long as client libraries may retry by themselves
	// (15 s is a good time): the first answer may have been lost, and a lost answer is not a lost lock. Later it may
	// answer ErrLost. A backend that keeps no memory of released IDs answers nil when it finds the grant gone after a
	// try of its own with an unknown outcome (a client library's retries count as such) and before Start + TTL: the
	// server cannot have expired it yet. A Release never touches a successor.
	//
	// Release(Lease{Key, ID}), with no Token and no State, is a clean-up: it MUST withdraw a waiting request, a
	// request that is still on its way, and a grant whose answer was lost, and answers nil also when there was
	// nothing to undo.
	//
	// Callers never overlap Release with an Extend of the same lease. Where one server timer serves several leases,
	// a backend MUST retry a Release whose outcome is unknown until it is answered or the timer is dead, so that
	// heartbeats of the neighbours keep no orphan alive.
	Release(ctx context.Context, lease Lease) error

	// Capabilities tells what this backend promises. It does not change and asks no server: what depends on the server
	// is asked once, when the Locker is made.
	Capabilities() Capabilities

	// Close ends waits with ErrClosed, waits for what the Locker started, and frees its connections, but not a client
	// library's client that was handed in. It returns within seconds, also when the server does not answer. Later calls
	// answer ErrClosed; a second Close answers nil. What is still held is left to expire; where Capabilities.EarlyFree
	// has EarlyFreeDisconnect it is freed at once, and Request.Lost is called with ReasonClosed before. Client releases
	// its own locks first.
	Close() error
}

// Request asks for one grant. Fields may be added; their zero value will mean today's behaviour.
type Request struct {
	// Key names the lock: 1 to [MaxKeyLength] bytes of UTF-8 without NUL. Keys that differ in any byte are different locks.
	Key string
	// ID is this request's own, minted by the caller: a UUIDv7 in its 36-byte form, or any printable ASCII
	// of that length or less without spaces, so that it fits into what servers offer as the name of a session. Client
	// mints one for each Acquire.
	ID string
	// TTL is how long the server keeps the lock without an Extend.
	TTL time.Duration
	// NoWait asks once instead of waiting.
	NoWait bool
	// NoExtend says that no heartbeat will extend the lease, so that it needs a server timer of its own. A backend whose
	// every lease has one ignores it.
	NoExtend bool
	// Holder tells people who asks: at most [MaxHolderLength] bytes of UTF-8.
	Holder string
	// Lost, if not nil, is called at most once, from any goroutine, when the backend learns by itself that the granted
	// lease has ended, or that it can never be extended again (Capabilities.ReportsLoss). It never blocks. It is not
	// called for a lease that was released, nor instead of an answer ErrLost.
	Lost func(Reason)
}

// Lease is one grant. Fields may be added, so leases are not compared with ==.
type Lease struct {
	Key, ID, Holder string
	// Token is the fencing token: greater than that of every earlier grant of Key, and the same for the whole life
	// of the grant. A resource that remembers the greatest token it has seen can refuse a late writer ([ErrStaleToken]).
	// It is at most 2^53, so that it survives languages whose numbers are doubles.
	Token uint64
	// TTL as granted, at least as requested.
	TTL time.Duration
	// Start is the moment from which TTL is counted: see "Start before send". It carries a monotonic reading.
	Start time.Time
	// State is the backend's own; nil in a clean-up.
	State any
}

// Limits of a request, the same on every backend.
const (
	MaxKeyLength    = 512                   // bytes
	MaxHolderLength = 1024                  // bytes
	MinTTL          = 10 * time.Millisecond // below, the safety margin would eat the lease
	MaxTTL          = 24 * 24 * time.Hour   // more does not fit into the milliseconds of PostgreSQL's timers
)

// Validate says what is wrong with a request. Every backend's Acquire calls it first, so that a bad request gets the
// same answer everywhere and sends nothing.
func (r Request) Validate() error {
	switch {
	case r.Key == "":
		return errors.New("the key is empty: name the lock with 1 to 512 bytes")
	case len(r.Key) > MaxKeyLength:
		return fmt.Errorf("the key has %d bytes: the most is %d (hash long names)", len(r.Key), MaxKeyLength)
	case !utf8.ValidString(r.Key):
		return errors.New("the key is not valid UTF-8: encode binary names, for example as hex")
	case strings.ContainsRune(r.Key, 0):
		return errors.New("the key contains a NUL byte: remove it")
	case !validID(r.ID):
		return fmt.Errorf("the request's ID %q is not 1 to 36 bytes of printable ASCII without spaces: use a UUID", r.ID)
	case r.TTL < MinTTL:
		return fmt.Errorf("a TTL of %v is too short: the least is %v", r.TTL, MinTTL)
	case r.TTL > MaxTTL:
		return fmt.Errorf("a TTL of %v is too long: the most is %v", r.TTL, MaxTTL)
	case len(r.Holder) > MaxHolderLength:
		return fmt.Errorf("the holder's label has %d bytes: the most is %d", len(r.Holder), MaxHolderLength)
	case !utf8.ValidString(r.Holder):
		return errors.New("the holder's label is not valid UTF-8: encode it")
	}
	return nil
}

func validID(id string) bool {
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return false
		}
	}
	return id != "" && len(id) <= 36
}

// Capabilities is what a backend promises. Programs read it, the suite holds the backend to it, and the
// zero value promises the least of each.
type Capabilities struct {
	// Backend is the name used in errors: "redis", "memory".
	Backend string
	// MinTTL is the shortest TTL granted; a shorter request is raised to it.
	MinTTL time.Duration
	// Granularity is the step in which TTLs are granted; a request between two steps gets the longer. Zero: any.
	Granularity time.Duration
	// Expiry is how long after its TTL a lock may still be kept from others, when nobody releases it. When another
	// server takes over, it may be one more TTL.
	Expiry time.Duration
	// EarlyFree names the events, besides an operator's own doing, that free a lock before its TTL is over. The work
	// is told of them at once on a live link and by the deadline otherwise: then only the token protects.
	EarlyFree EarlyFree
	// Fair: clients are granted a key in the order in which they began to wait.
	Fair bool
	// Notifies: a release wakes the next waiter at once, instead of being found by polling.
	Notifies bool
	// Fallback is the longest that a lost wake-up or a dead waiter delays those behind it. Zero: no promise but the TTL.
	Fallback time.Duration
	// Fencing is the worst event over which tokens still grow.
	Fencing Fencing
	// ReportsLoss: Request.Lost is called when a lock is taken away while the link is alive.
	ReportsLoss bool
	// Labels: Holder is kept at the server, and told to those who find the key held.
	Labels bool
}

// EarlyFree is a set of events that free locks before their TTL is over.
type EarlyFree uint8

// The events of EarlyFree.
const (
	EarlyFreeDisconnect EarlyFree = 1 << iota // the client's connection or session ends
	EarlyFreeRestart                          // the server restarts or crashes
	EarlyFreeFailover                         // another server takes over
)

// String lists the events: "restart, failover", or "none".
func (e EarlyFree) String() string {
	var names []string
	for i, name := range []string{"disconnect", "restart", "failover"} {
		if e&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// Fencing tells which events a key's tokens survive: after the event the next token is still greater than all before.
// Each value includes those before it.
type Fencing uint8

// The values of Fencing.
const (
	FencingVolatile Fencing = iota // tokens grow while the server runs
	FencingRestart                 // and over a clean stop and start
	FencingCrash                   // and over a crash, with whatever data the server comes back with
	FencingFailover                // and when another server takes over
)

// String names the event: "nothing", "restart", "crash", "failover".
func (f Fencing) String() string {
	names := [...]string{"nothing", "restart", "crash", "failover"}
	if int(f) < len(names) {
		return names[f]
	}
	return fmt.Sprintf("Fencing(%d)", uint8(f))
}

// Reason tells why a lock was lost.
type Reason uint8

// The reasons for a loss.
const (
	ReasonExpired      Reason = iota + 1 // trust ran out before a renewal was answered
	ReasonTaken                          // the server said that the lock is not held any more
	ReasonDisconnected                   // the session or connection that held the lock ended
	ReasonMaxHold                        // held for longer than WithMaxHold
	ReasonClosed                         // the Client was closed
)

// String names the reason, for messages.
func (r Reason) String() string {
	names := [...]string{"", "expired", "taken", "disconnected", "max hold", "closed"}
	if r > 0 && int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("Reason(%d)", uint8(r))
}

// The facts that calls answer, matched with errors.Is.
var (
	// ErrHeld: somebody else holds the key.
	ErrHeld = errors.New("locker: held by another")
	// ErrLost: the lock is definitely not held any more, and was not released.
	ErrLost = errors.New("locker: lock lost")
	// ErrReleased is the cause of a Lock's ended context after a normal Release.
	ErrReleased = errors.New("locker: lock released")
	// ErrClosed: the Client or Locker was closed.
	ErrClosed = errors.New("locker: closed")
	// ErrStaleToken is every guard's answer to a token that is older than one it has seen: the writer's lock was lost.
	ErrStaleToken = errors.New("locker: stale fencing token")
)

// HeldError is an ErrHeld that knows more.
type HeldError struct {
	Key       string
	Holder    string        // the holder's label; "" if not known
	Remaining time.Duration // until the holder's lease ends if it is not extended; 0 if not known
}

// Error says who holds the key, and for how long.
func (e *HeldError) Error() string {
	msg := fmt.Sprintf("locker: %q is held by another", e.Key)
	if e.Holder != "" {
		msg = fmt.Sprintf("locker: %q is held by %q", e.Key, e.Holder)
	}
	if e.Remaining > 0 {
		msg += fmt.Sprintf(" for another %v", e.Remaining.Round(time.Millisecond))
	}
	return msg
}

// Is matches ErrHeld.
func (e *HeldError) Is(target error) bool { return target == ErrHeld }

// LostError tells which lock was lost and why. It is the cause of the context of a lost [Lock], and matches ErrLost.
type LostError struct {
	Key    string
	Token  uint64
	Reason Reason
}

// Error names key, token and reason.
func (e *LostError) Error() string {
	return fmt.Sprintf("locker: lock %q (token %d) lost: %v", e.Key, e.Token, e.Reason)
}

// Is matches ErrLost.
func (e *LostError) Is(target error) bool { return target == ErrLost }

// Error wraps whatever went wrong in a call, so that a log line tells which call on what.
type Error struct {
	Op      string // "open", "acquire", "extend", "release", "do", "inspect", "list", "break", "guard"
	Key     string // "" where there is none
	Backend string // Capabilities.Backend; "" if the call did not reach a backend
	Err     error  // without passwords
}

// Error is one line: locker: redis: acquire "invoice/42": connection refused.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("locker: ")
	if e.Backend != "" {
		b.WriteString(e.Backend + ": ")
	}
	b.WriteString(e.Op)
	if e.Key != "" {
		fmt.Fprintf(&b, " %q", e.Key)
	}
	b.WriteString(": ")
	if e.Err != nil {
		b.WriteString(strings.TrimPrefix(e.Err.Error(), "locker: "))
	}
	return b.String()
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Holding is what an operator sees of one key. A zero Token says that nobody holds it.
type Holding struct {
	Key, ID, Holder string // ID is "" if not known, Holder where Capabilities.Labels is false
	Token           uint64
	Since           time.Time     // when it was granted, by the server's clock; zero if not known
	Remaining       time.Duration // until it ends unless extended; 0 if not known
	Waiters         int           // how many wait for the key at the server; -1 if not known
}

// Inspector is a Locker that can tell who holds a key.
type Inspector interface {
	// Inspect answers a Holding without Token, and no error, for a key that nobody holds.
	Inspect(ctx context.Context, key string) (Holding, error)
}

// Lister is a Locker that can list all keys that are held.
type Lister interface {
	// List yields every key that is held for the whole of the iteration at least once, in no order; of those that come
	// and go meanwhile it may yield some. After an error it ends.
	List(ctx context.Context) iter.Seq2[Holding, error]
}

// Breaker is a Locker by which an operator can take a lock away.
type Breaker interface {
	// Break frees held.Key if the grant with held.Token still holds it, and answers ErrLost if it does not. The holder
	// learns of it as of any eviction: at once where Capabilities.ReportsLoss, else at its next heartbeat.
	Break(ctx context.Context, held Holding) error
}

// As finds the optional interface T ([Inspector], [Lister], [Breaker], or one of a backend's own) in l or in the
// Lockers that it wraps.
func As[T any](l Locker) (T, bool) {
	for l != nil {
		if t, ok := l.(T); ok {
			return t, true
		}
		w, ok := l.(interface{ Unwrap() Locker })
		if !ok {
			break
		}
		l = w.Unwrap()
	}
	var none T
	return none, false
}
