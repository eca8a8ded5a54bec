package httplock

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"
)

// Open finds the backend by its scheme, and refuses a URL with anything that it would not use.
func TestURL(t *testing.T) {
	s := startServer(t)
	client, err := locker.Open(t.Context(), "httplock://"+s.addr)
	if err != nil {
		t.Fatal(err)
	}
	err = client.Do(t.Context(), "key", func(context.Context, *locker.Lock) error { return nil })
	if err := errors.Join(err, client.Close()); err != nil {
		t.Error(err)
	}
	for _, url := range []string{
		"httplock://", "httplock://localhost", "httplock://" + s.addr + "/path", "httplock://" + s.addr + "?ttl=1s",
		"httplock://me:secret@" + s.addr, "httplock://one:1,two:2",
	} {
		l, err := locker.OpenLocker(t.Context(), url, locker.Config{})
		if err == nil {
			t.Errorf("%s was opened", url)
			_ = l.Close()
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: the error has the password", err)
		}
	}
}

// What is no lock server is no reason to believe that a lock is lost.
func TestOtherServer(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	b := New(strings.TrimPrefix(other.URL, "http://"), nil)
	defer b.Close()
	_, acquire := b.Acquire(t.Context(), locker.Request{Key: "key", ID: "id", TTL: time.Second})
	for _, err := range []error{acquire, b.Release(t.Context(), locker.Lease{Key: "key", ID: "id"})} {
		if err == nil || errors.Is(err, locker.ErrLost) || !strings.Contains(err.Error(), "404") {
			t.Errorf("got %v, want an error that names the status", err)
		}
	}
}

func TestForeignLease(t *testing.T) {
	s := startServer(t)
	b := New(s.addr, nil)
	defer b.Close()
	lease := locker.Lease{Key: "key", ID: "id", Token: 1, TTL: time.Second, State: "another server"}
	_, extend := b.Extend(t.Context(), lease)
	for _, err := range []error{extend, b.Release(t.Context(), lease)} {
		if err == nil || errors.Is(err, locker.ErrLost) || !strings.Contains(err.Error(), "another server") {
			t.Errorf("got %v, want an error that refuses the lease", err)
		}
	}
}
