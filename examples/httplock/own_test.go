// What the suite cannot check, because it is not the same for every backend.

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
	"github.com/fec20105/locker/conformance"
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

// A lease is extended and released at the server that granted it.
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

// Close ends requests that a hanging server does not answer.
func TestCloseWhileServerHangs(t *testing.T) {
	s := startServer(t)
	network := conformance.NewNetwork()
	defer network.Close()
	b := New(s.addr, network.DialContext)
	lease, err := b.Acquire(t.Context(), locker.Request{Key: "key", ID: "id", TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	network.Hang()
	sent := network.Stats().Requests
	extended := make(chan error, 1)
	go func() {
		_, err := b.Extend(context.Background(), lease)
		extended <- err
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); network.Stats().Requests == sent; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the request was never sent")
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := <-extended; !errors.Is(err, locker.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}
