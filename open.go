package locker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
)

// Config is what a backend's opener gets.
type Config struct {
	// URL names the server: scheme, user info, path and query as url.Parse makes them; Host may be a list, "h1:2379,[::1]:2379".
	URL *url.URL
	// Dial, if not nil, makes every connection of the backend.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Logger is never nil in an opener.
	Logger *slog.Logger
}

var openers = struct {
	sync.RWMutex
	byScheme map[string]func(context.Context, Config) (Locker, error)
}{byScheme: make(map[string]func(context.Context, Config) (Locker, error))}

// Register makes a backend known by its URL scheme. Backends call it in an init function, so that a program chooses them by
// import. It panics if the scheme is not lower-case letters, digits, "+", "-" and ".", if open is nil, and if the scheme is taken.
func Register(scheme string, open func(context.Context, Config) (Locker, error)) {
	switch {
	case !validScheme(scheme):
		panic(fmt.Sprintf("locker: Register(%q): a scheme begins with a lower-case letter and has only those, digits, \"+\", \"-\" and \".\"", scheme))
	case open == nil:
		panic(fmt.Sprintf("locker: Register(%q): the function is nil", scheme))
	}
	openers.Lock()
	defer openers.Unlock()
	if _, taken := openers.byScheme[scheme]; taken {
		panic(fmt.Sprintf("locker: Register(%q): the scheme is registered already", scheme))
	}
	openers.byScheme[scheme] = open
}

func validScheme(s string) bool {
	for i := range len(s) {
		letter := 'a' <= s[i] && s[i] <= 'z'
		if !letter && (i == 0 || !strings.ContainsRune("0123456789+-.", rune(s[i]))) {
			return false
		}
	}
	return s != ""
}

// Schemes lists the registered URL schemes, sorted.
func Schemes() []string {
	openers.RLock()
	defer openers.RUnlock()
	return slices.Sorted(maps.Keys(openers.byScheme))
}

// Open opens the backend that the URL names and makes a Client for it; the Client's Close closes the backend too. The
// backend's package must be imported, if only for its registration:
//
//	import _ "github.com/fec20105/locker/redisbackend"
func Open(ctx context.Context, rawURL string, opts ...Option) (*Client, error) {
	defaults := defaultSettings()
	s, err := with(&defaults, opts)
	if err != nil {
		return nil, &Error{Op: "open", Err: err}
	}
	l, err := OpenLocker(ctx, rawURL, Config{Logger: s.logger})
	if err != nil {
		return nil, err
	}
	c, err := New(l, opts...)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	c.owned = true
	return c, nil
}

// OpenLocker opens the backend that the URL names, for programs that decorate it before they give it to [New]. Dial and Logger are
// taken from cfg, and both may be nil. No error contains the URL: it may hold a password.
func OpenLocker(ctx context.Context, rawURL string, cfg Config) (Locker, error) {
	u, err := parseURL(rawURL)
	if err != nil {
		return nil, &Error{Op: "open", Err: err}
	}
	openers.RLock()
	open, ok := openers.byScheme[u.Scheme]
	openers.RUnlock()
	if !ok {
		return nil, &Error{Op: "open", Err: fmt.Errorf("unknown scheme %q: registered are %s (forgotten import?)", u.Scheme, known())}
	}
	cfg.URL = u
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l, err := open(ctx, cfg)
	if err == nil && l == nil {
		err = errors.New("the backend opened nothing, and does not say why")
	}
	if err != nil {
		if _, wrapped := errors.AsType[*Error](err); wrapped {
			return nil, err
		}
		return nil, &Error{Op: "open", Backend: u.Scheme, Err: err}
	}
	return l, nil
}

func known() string {
	if s := Schemes(); len(s) > 0 {
		return strings.Join(s, ", ")
	}
	return "none"
}

// parseURL is url.Parse for host lists, which it refuses where a host has a port or is an IPv6 address; and its errors say
// nothing of the URL's content.
func parseURL(raw string) (*url.URL, error) {
	if raw == "" {
		return nil, errors.New("the URL is empty: name a server, for example redis://127.0.0.1:6379")
	}
	scheme, rest, ok := strings.Cut(raw, ":")
	scheme = strings.ToLower(scheme)
	if !ok || !validScheme(scheme) {
		return nil, errors.New("the URL has no scheme: write scheme://host, for example redis://127.0.0.1:6379")
	}
	bad := fmt.Errorf("the %s URL cannot be parsed: check ports, write IPv6 addresses as [::1], and special characters of user name, password and parameters as %%XX", scheme)
	authority, ok := strings.CutPrefix(rest, "//")
	if !ok {
		u, err := url.Parse(scheme + ":" + rest)
		if err != nil || strings.Contains(rest, "@") {
			return nil, bad
		}
		return u, nil
	}
	end := strings.IndexAny(authority, "/?#")
	if end < 0 {
		end = len(authority)
	}
	authority, rest = authority[:end], authority[end:]
	if strings.Contains(rest, "@") {
		// A password with a "/" would look like this: taken literally, half of it would become a host's name in errors.
		return nil, fmt.Errorf("the %s URL has an @ behind the host: write / as %%2F and @ as %%40 in user name, password and parameters", scheme)
	}
	userinfo, hosts := "", authority
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		userinfo, hosts = authority[:at+1], authority[at+1:]
	}
	u, err := url.Parse(scheme + "://" + userinfo + "host" + rest)
	if err != nil {
		return nil, bad
	}
	if _, err := url.ParseQuery(u.RawQuery); err != nil {
		return nil, bad
	}
	for parameter := range strings.SplitSeq(u.RawQuery, "&") {
		if parameter != "" && !strings.Contains(parameter, "=") {
			// The rest of a password with an "&", perhaps.
			return nil, fmt.Errorf("the %s URL has a parameter without a value: write name=value, and & in values as %%26", scheme)
		}
	}
	list := strings.Split(hosts, ",")
	for i, host := range list {
		h, err := url.Parse("x://" + host)
		bareIPv6 := strings.Count(host, ":") > 1 && host[0] != '['
		if err != nil || bareIPv6 || host == "" && hosts != "" {
			return nil, bad
		}
		list[i] = h.Host
	}
	u.Host = strings.Join(list, ",")
	return u, nil
}
