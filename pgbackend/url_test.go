package pgbackend_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/fec20105/locker"
)

// TestBadURL is refused without a server, and without telling what may be a password.
func TestBadURL(t *testing.T) {
	t.Parallel()
	for rawURL, words := range map[string]string{
		"postgres://u:secret@h/db?waiter=3":                      "known are application_name",
		"postgres://u:p&secret=1@h/db?secret":                    "without a value",
		"postgres://u:secret@h/db?waiters=none":                  "waiters must be a number from 1",
		"postgres://u:secret@h/db?waiters=0":                     "waiters must be a number from 1",
		"postgres://u:secret@h/db?waiters=2000":                  "1 to 1000",
		"postgres://u:secret@h/db?ddl=no":                        "ddl must be true or false",
		"postgres://u:secret@h/db?prefix=a&prefix=b":             "prefix is given 2 times",
		"postgres://u:secret@h/db?prefix=a+b":                    "use a short name",
		"postgres://u:secret@h/db?sequence=a.b.c":                "schema.name",
		"postgres://u:secret@h/db?sslmode=perhaps":               "settings are bad",
		"postgres://u:secret@h/db?host=other":                    "names a server twice",
		"postgres://u:secret@h:port/db":                          "port",
		"postgres://u:secret@h/db?sslrootcert=/nowhere":          "settings are bad",
		"postgres://u:secret@h/db?target_session_attrs=anything": "settings are bad",
	} {
		_, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{Dial: func(context.Context, string, string) (net.Conn, error) {
			t.Errorf("%s: a server was asked", rawURL)
			return nil, net.ErrClosed
		}})
		if err == nil {
			t.Errorf("%s is accepted", rawURL)
			continue
		}
		t.Logf("%s: %v", rawURL, err)
		mustSay(t, err, words)
	}
}

// TestHosts are tried one after the other.
func TestHosts(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string][]string{
		"postgres://u@h1/db":                               {"h1:5432"},
		"postgresql://u@h1:1,h2,[::1]:3/db":                {"h1:1", "h2:5432", "[::1]:3"},
		"postgres://u@[::1]/db":                            {"[::1]:5432"},
		"postgres:///db?host=h1,h2&port=1,2":               {"h1:1", "h2:2"},
		"postgres://u@/db?host=/run/nowhere":               {"/run/nowhere/.s.PGSQL.5432"},
		"postgres://u@h1/db?prefix=app:&sslmode=disable":   {"h1:5432"},
		"postgres://u:p%27%20%5C@h1/db?application_name=a": {"h1:5432"},
	} {
		var mu sync.Mutex
		var got []string
		_, err := locker.OpenLocker(t.Context(), rawURL, locker.Config{Dial: func(_ context.Context, _, addr string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if !slices.Contains(got, addr) { // with TLS and without
				got = append(got, addr)
			}
			return nil, errors.New("no route")
		}})
		mustSay(t, err, "no route")
		if !slices.Equal(got, want) {
			t.Errorf("%s: dialled %q, want %q", rawURL, got, want)
		}
	}
}
