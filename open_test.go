package locker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/membackend"
)

// The scheme of these tests opens what the URL's path says, and remembers what it was given.
const testScheme = "open-test.1+x"

var opened locker.Config

func init() { //nolint:gochecknoinits // schemes are registered once in a process
	locker.Register(testScheme, func(_ context.Context, cfg locker.Config) (locker.Locker, error) {
		opened = cfg
		switch cfg.URL.Path {
		case "/fails":
			return nil, errRefused
		case "/fails-wrapped":
			return nil, &locker.Error{Op: "open", Backend: "test", Err: errRefused}
		case "/nil":
			return nil, nil //nolint:nilnil // a mistake that must not crash the program
		}
		return membackend.New(), nil
	})
}

func TestRegisterPanics(t *testing.T) {
	open := func(context.Context, locker.Config) (locker.Locker, error) { return membackend.New(), nil }
	for _, c := range []struct {
		scheme string
		open   func(context.Context, locker.Config) (locker.Locker, error)
		want   string
	}{
		{"", open, `Register(""): a scheme begins with a lower-case letter`},
		{"Redis", open, "lower-case"},
		{"1redis", open, "lower-case"},
		{"redis:", open, "lower-case"},
		{"rédis", open, "lower-case"},
		{"redis_x", open, "lower-case"},
		{"nil-function", nil, `Register("nil-function"): the function is nil`},
		{testScheme, open, "the scheme is registered already"},
		{"mem", open, "the scheme is registered already"},
	} {
		func() {
			defer func() {
				if got, _ := recover().(string); !strings.Contains(got, c.want) || !strings.HasPrefix(got, "locker: ") {
					t.Errorf("%q: panicked with %q, want %q", c.scheme, got, c.want)
				}
			}()
			locker.Register(c.scheme, c.open)
		}()
		if slices.Contains(locker.Schemes(), c.scheme) && c.scheme != testScheme && c.scheme != "mem" {
			t.Errorf("%q was registered", c.scheme)
		}
	}
	if s := locker.Schemes(); !slices.Contains(s, testScheme) || !slices.Contains(s, "mem") || !slices.IsSorted(s) {
		t.Errorf("Schemes: %v", s)
	}
}

func TestOpenErrors(t *testing.T) {
	for raw, want := range map[string]string{
		"":                                   "the URL is empty: name a server",
		"localhost":                          "the URL has no scheme: write scheme://host",
		"://host":                            "the URL has no scheme",
		"//host":                             "the URL has no scheme",
		"1://host":                           "the URL has no scheme",
		"127.0.0.1:6379":                     "the URL has no scheme",
		"nosuch://host":                      `unknown scheme "nosuch": registered are `,
		"NoSuch://host":                      "(forgotten import?)",
		"nosuch:opaque":                      `unknown scheme "nosuch"`,
		testScheme + "://host:port":          "the " + testScheme + " URL cannot be parsed",
		testScheme + "://h1,,h2":             "cannot be parsed",
		testScheme + "://h1,":                "cannot be parsed",
		testScheme + "://::1:6379":           "cannot be parsed",
		testScheme + "://[::1:6379":          "cannot be parsed",
		testScheme + "://h1:1,h2:x":          "cannot be parsed",
		testScheme + "://ho st":              "cannot be parsed",
		testScheme + "://host?a=%zz":         "cannot be parsed",
		testScheme + "://host?a;b":           "cannot be parsed",
		testScheme + "://host/%zz":           "cannot be parsed",
		testScheme + "://u:p%zz@host":        "cannot be parsed",
		testScheme + "://host/\x7f":          "cannot be parsed",
		testScheme + "://u:p/w@host":         "write / as %2F and @ as %40",
		testScheme + "://u:p?w@host":         "write / as %2F and @ as %40",
		testScheme + "://host?password=a@":   "write / as %2F and @ as %40",
		testScheme + ":u:p@host":             "cannot be parsed",
		testScheme + "://host/fails":         "locker: open-test.1+x: open: connection refused",
		testScheme + "://host/fails-wrapped": "locker: test: open: connection refused",
		testScheme + "://host/nil":           "locker: open-test.1+x: open: ",
		"mem://":                             "mem://NAME",
		"mem://name?password=a&s3cret":       "parameter without a value",
		"mem://name?ttl=3":                   `a parameter is unknown`,
	} {
		c, err := locker.Open(t.Context(), raw)
		if c != nil || err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "locker: ") {
			t.Errorf("%q: got %v, %q, want %q", raw, c, err, want)
		}
		if _, ok := errors.AsType[*locker.Error](err); err != nil && !ok {
			t.Errorf("%q: no *Error: %v", raw, err)
		}
	}
	_, err := locker.Open(t.Context(), "nosuch://host")
	if !strings.Contains(err.Error(), strings.Join(locker.Schemes(), ", ")) {
		t.Error("the registered schemes are not listed:", err)
	}
}

func TestParsedURLs(t *testing.T) {
	for raw, want := range map[string]url.URL{
		"://h":                             {Host: "h"},
		"://h:1":                           {Host: "h:1"},
		"://h1:1,h2:2,[::1]:3":             {Host: "h1:1,h2:2,[::1]:3"},
		"://[::1]":                         {Host: "[::1]"},
		"://[fe80::1%25eth0]:1,h2":         {Host: "[fe80::1%eth0]:1,h2"},
		"://127.0.0.1:1,[2001:db8::1]:2/p": {Host: "127.0.0.1:1,[2001:db8::1]:2", Path: "/p"},
		"://u:p@h1:1,h2:2/p?a=b&c=%40":     {User: url.UserPassword("u", "p"), Host: "h1:1,h2:2", Path: "/p", RawQuery: "a=b&c=%40"},
		"://u:p@w@h":                       {User: url.UserPassword("u", "p@w"), Host: "h"},
		"://u:p%2Fw%3F%23%25@h":            {User: url.UserPassword("u", "p/w?#%"), Host: "h"},
		"://:p@h":                          {User: url.UserPassword("", "p"), Host: "h"},
		"://u@h":                           {User: url.User("u"), Host: "h"},
		":///a/path":                       {Path: "/a/path"},
		"://h#fragment":                    {Host: "h", Fragment: "fragment"},
		":opaque":                          {Opaque: "opaque"},
	} {
		for _, scheme := range []string{testScheme, strings.ToUpper(testScheme)} {
			l, err := locker.OpenLocker(t.Context(), scheme+raw, locker.Config{})
			if err != nil {
				t.Errorf("%s: %v", raw, err)
				continue
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			want.Scheme = testScheme
			equal(t, raw, *opened.URL, want)
			if opened.Logger == nil {
				t.Error("the opener got no Logger")
			}
		}
	}
}

func TestOpenLockerHandsOnTheConfig(t *testing.T) {
	dialed := false
	logger := slog.New(slog.DiscardHandler)
	l, err := locker.OpenLocker(t.Context(), testScheme+"://h", locker.Config{
		URL:    &url.URL{Scheme: "ignored"},
		Logger: logger,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			dialed = true
			return nil, errRefused
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	equal(t, "URL", opened.URL.Host, "h")
	equal(t, "Logger", opened.Logger, logger)
	if _, err := opened.Dial(t.Context(), "tcp", "h:1"); !dialed || !errors.Is(err, errRefused) {
		t.Error("Dial was not handed on")
	}
}

func TestOpenGivesItsLoggerToTheBackendAndClosesIt(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	c, err := locker.Open(t.Context(), testScheme+"://h", locker.WithLogger(logger))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "Logger", opened.Logger, logger)
	back := c.Locker()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := back.Acquire(t.Context(), locker.Request{Key: "k", ID: "id", TTL: ttl}); !errors.Is(err, locker.ErrClosed) {
		t.Error("the backend that Open made is still open:", err)
	}
	if err := c.Close(); err != nil {
		t.Error("the second Close:", err)
	}
}

func TestCloseLeavesALockerThatWasHandedIn(t *testing.T) {
	back := membackend.New()
	c, err := locker.New(back)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := back.Acquire(t.Context(), locker.Request{Key: "k", ID: "id", TTL: ttl}); err != nil {
		t.Error(err)
	}
}

// FuzzOpenSecrets looks for passwords in errors: in the user info and in parameters, percent-encoded, half so, or not at all.
// Two halves of each secret are words of their own, so that a part of it is found too.
func FuzzOpenSecrets(f *testing.F) {
	for _, password := range []string{
		"", "simple", "p@ss", "p/ss", "p?ss", "p#ss", "p:ss", "p%ss", "p%zz", "p%40ss", "p[ss]", "p ss", "p\nss", "p\x00", "p,ss", `p"ss\`, "пароль", "\xff\xfe",
		"a@b/c?d#e", "//", "@@", ":@/", "%", "%2", "]:1@h", "1:99999",
	} {
		f.Add(password, "h1:6379,[::1]:6380", "/0")
		f.Add(password, "h:port", "/fails")
		f.Add(password, "", "")
	}
	f.Fuzz(func(t *testing.T, password, hosts, path string) {
		const left, right = "Xk9Qw", "Wv7Zj"
		if strings.Contains(hosts+path, left) || strings.Contains(hosts+path, right) {
			t.Skip("the secret is not secret")
		}
		secret := left + password + right
		for _, scheme := range []string{testScheme, "nosuch", "mem", ""} {
			for _, p := range []string{secret, url.QueryEscape(secret), url.PathEscape(secret), strings.ReplaceAll(secret, "@", "%40")} {
				urls := []string{
					scheme + "://user:" + p + "@" + hosts + path,
					scheme + "://:" + p + "@" + hosts + path + "?a=b",
					scheme + ":user:" + p + "@" + hosts,
					"user:" + p + "@" + hosts + path,
				}
				{
					urls = append(urls,
						scheme+"://"+hosts+path+"?password="+p,
						scheme+"://user:"+p+"@"+hosts+path+"?a=b&password="+p)
				}
				for _, raw := range urls {
					c, err := locker.Open(t.Context(), raw)
					if err == nil {
						_ = c.Close()
						continue
					}
					if msg := err.Error(); strings.Contains(msg, left) || strings.Contains(msg, right) {
						t.Errorf("%q: the secret is in the error: %s", raw, msg)
					}
				}
			}
		}
	})
}
