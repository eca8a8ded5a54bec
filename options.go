package locker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"
	"unicode/utf8"
)

// Option sets how locks are taken and kept. Given to [New] or [Open] it is the default for all calls of the Client,
// given to a call it holds for that call. A bad value is refused where it is given.
type Option interface {
	DoOption
	option() // keeps a DoOption from being one
}

// DoOption is an option of [Client.Do]; every Option is one too.
type DoOption interface {
	apply(*settings) error
}

type settings struct {
	ttl            time.Duration
	heartbeat      time.Duration // 0: a third of the granted TTL
	noHeartbeat    bool
	wait           time.Duration // 0: as long as ctx
	noWait         bool
	holder         string
	minHold        time.Duration
	maxHold        time.Duration // 0: for ever
	warnBefore     time.Duration
	warn           func(*Lock)
	releaseTimeout time.Duration
	logger         *slog.Logger
	compensate     func(context.Context, *LostError) error
}

// The defaults, and the bounds that are not options.
const (
	defaultTTL            = 15 * time.Second
	defaultReleaseTimeout = 5 * time.Second
	compensationTimeout   = time.Minute
)

func defaultSettings() settings {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return settings{
		ttl:            defaultTTL,
		holder:         fmt.Sprintf("%s pid %d", host, os.Getpid()),
		releaseTimeout: defaultReleaseTimeout,
		logger:         slog.New(slog.DiscardHandler),
	}
}

// with returns the settings changed by opts, a later one over an earlier of its kind. They are checked together, so that those
// of different kinds may come in any order.
func with[O DoOption](s *settings, opts []O) (*settings, error) {
	if len(opts) == 0 {
		return s, nil
	}
	changed := *s
	for i, o := range opts {
		if any(o) == nil {
			return nil, fmt.Errorf("option %d is nil", i+1)
		}
		if err := o.apply(&changed); err != nil {
			return nil, err
		}
	}
	switch s := &changed; {
	case !s.noHeartbeat && s.heartbeat >= s.ttl-margin(s.ttl):
		return nil, fmt.Errorf("a heartbeat every %v does not keep a TTL of %v alive: make it a third of the TTL", s.heartbeat, s.ttl)
	case s.warn != nil && s.warnBefore >= s.ttl-margin(s.ttl):
		return nil, fmt.Errorf("a warning %v before the end of a TTL of %v would come at once: make it shorter than the TTL", s.warnBefore, s.ttl)
	case s.minHold > s.ttl:
		return nil, fmt.Errorf("a minimum hold of %v is longer than the TTL of %v: make the TTL at least as long", s.minHold, s.ttl)
	case s.maxHold > 0 && s.minHold > s.maxHold:
		return nil, fmt.Errorf("a minimum hold of %v is longer than the maximum hold of %v", s.minHold, s.maxHold)
	}
	return &changed, nil
}

type option func(*settings) error

func (o option) apply(s *settings) error {
	if o == nil {
		return errors.New("an option is nil")
	}
	return o(s)
}
func (option) option() {}

type doOption func(*settings) error

func (o doOption) apply(s *settings) error {
	if o == nil {
		return errors.New("an option is nil")
	}
	return o(s)
}

func positive(name string, d time.Duration, set func(*settings)) Option {
	return option(func(s *settings) error {
		if d <= 0 {
			return fmt.Errorf("%s(%v): the duration must be greater than zero", name, d)
		}
		set(s)
		return nil
	})
}

// WithTTL sets how long the server keeps a lock whose holder is silent; the default is 15 s. A heartbeat extends it,
// so the TTL is not how long the work may take but how long others wait for a dead holder. From [MinTTL] to [MaxTTL].
func WithTTL(ttl time.Duration) Option {
	return option(func(s *settings) error {
		if ttl < MinTTL || ttl > MaxTTL {
			return fmt.Errorf("WithTTL(%v): a TTL is between %v and %v", ttl, MinTTL, MaxTTL)
		}
		s.ttl = ttl
		return nil
	})
}

// WithHeartbeat sets how often a held lock is extended; the default is a third of the TTL.
func WithHeartbeat(every time.Duration) Option {
	return positive("WithHeartbeat", every, func(s *settings) { s.heartbeat, s.noHeartbeat = every, false })
}

// WithoutHeartbeat leaves the lock to end after its TTL unless [Lock.Extend] is called.
func WithoutHeartbeat() Option {
	return option(func(s *settings) error { s.noHeartbeat = true; return nil })
}

// WithWait bounds how long a call waits for a lock that others hold. It bounds the wait only, not the work; without
// it the wait is bounded by the call's ctx alone.
func WithWait(d time.Duration) Option {
	return positive("WithWait", d, func(s *settings) { s.wait, s.noWait = d, false })
}

// WithNoWait asks once, and answers [ErrHeld] if somebody else holds the lock or waits for it.
func WithNoWait() Option {
	return option(func(s *settings) error { s.noWait = true; return nil })
}

// WithHolder sets the label by which people see who holds a lock; the default names host and process.
func WithHolder(label string) Option {
	return option(func(s *settings) error {
		if len(label) > MaxHolderLength || !utf8.ValidString(label) {
			return fmt.Errorf("WithHolder: the label must be UTF-8 of at most %d bytes", MaxHolderLength)
		}
		s.holder = label
		return nil
	})
}

// WithMinHold keeps the lock for at least d from its grant, also if it is released earlier, so that schedulers whose clocks
// differ by less than d run a job once. It is not kept when it was lost. d is at most the TTL. If the Client is closed or the
// process ends meanwhile, the server keeps the lock until the TTL is over: choose one that is not much longer than d.
func WithMinHold(d time.Duration) Option {
	return positive("WithMinHold", d, func(s *settings) { s.minHold = d })
}

// WithMaxHold stops renewing a lock d after its grant, so that work that is stuck does not hold it for ever: the lock is
// lost then with ReasonMaxHold, and the server frees it when the last renewal has run out.
func WithMaxHold(d time.Duration) Option {
	return positive("WithMaxHold", d, func(s *settings) { s.maxHold = d })
}

// WithWarning calls warn, on a goroutine of its own, when renewals keep failing and less than before is left until the lock is lost.
// It is called once per lapse: again only after a renewal has succeeded in between. Without a heartbeat it is called
// when less than before is left.
func WithWarning(before time.Duration, warn func(*Lock)) Option {
	return option(func(s *settings) error {
		if before <= 0 || warn == nil {
			return fmt.Errorf("WithWarning(%v): it takes a duration greater than zero and a function", before)
		}
		s.warnBefore, s.warn = before, warn
		return nil
	})
}

// WithReleaseTimeout bounds a release with all its tries, and each clean-up in the background; the default is 5 s.
func WithReleaseTimeout(d time.Duration) Option {
	return positive("WithReleaseTimeout", d, func(s *settings) { s.releaseTimeout = d })
}

// WithLogger sets where a Client reports what no caller is told: failing renewals and clean-ups, and releases with an
// unknown outcome after good work. The default is nowhere.
func WithLogger(l *slog.Logger) Option {
	return option(func(s *settings) error {
		if l == nil {
			return errors.New("WithLogger(nil): leave the option out to log nothing")
		}
		s.logger = l
		return nil
	})
}

// WithCompensation sets what [Client.Do] runs, exactly once, after the work has returned and if the lock was lost: the program's
// own undo. Its ctx has the values of Do's, is alive whatever ended the work, and ends after a minute.
func WithCompensation(undo func(ctx context.Context, lost *LostError) error) DoOption {
	return doOption(func(s *settings) error {
		if undo == nil {
			return errors.New("WithCompensation(nil): leave the option out to run nothing")
		}
		s.compensate = undo
		return nil
	})
}
