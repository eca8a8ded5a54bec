// Package httplock is an example of a backend, explained in docs/writing-a-backend.md: it keeps the whole contract of
// [locker.Locker] against a small lock server that speaks HTTP.
package httplock

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// A wait is answered after waitFor at the latest, and given up when its answer has not come after patience.
const (
	waitFor  = time.Second
	patience = 1500 * time.Millisecond
)

// Backend is one client of a Server.
type Backend struct {
	server string
	asks   http.Client // for questions, which are answered at once
	waits  http.Client // for waits, on connections of their own

	open  context.Context // ends with ErrClosed
	close context.CancelCauseFunc
	calls sync.RWMutex // read-locked by each request, so that Close can wait for all
}

var _ locker.Locker = (*Backend)(nil)

// New makes a client of the server at host:port. Connections are made with dial, or by package net if it is nil.
func New(host string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *Backend {
	b := &Backend{server: "http://" + host + "/"}
	b.asks.Transport = &http.Transport{DialContext: dial, MaxConnsPerHost: 16, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute}
	b.waits.Transport = &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute}
	b.open, b.close = context.WithCancelCause(context.Background())
	return b
}

// Acquire implements [locker.Locker].
func (b *Backend) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	if err := req.Validate(); err != nil {
		return locker.Lease{}, failed("acquire", req.Key, err)
	}
	question := call{Key: req.Key, ID: req.ID, Holder: req.Holder, TTL: req.TTL}
	a, start, err := b.post(ctx, "acquire", question)
	for err == nil && a.Outcome == held {
		taken := &locker.HeldError{Key: req.Key, Holder: a.Holder, Remaining: a.Remaining}
		if req.NoWait {
			return locker.Lease{}, taken
		}
		b.wait(ctx, req.Key)
		if a, start, err = b.post(ctx, "acquire", question); err != nil {
			err = fmt.Errorf("%w while waiting: %w", err, taken)
		}
	}
	if err != nil {
		return locker.Lease{}, failed("acquire", req.Key, err)
	}
	return locker.Lease{
		Key: req.Key, ID: req.ID, Holder: req.Holder,
		Token: a.Token, TTL: req.TTL, Start: start, State: b.server,
	}, nil
}

// wait returns when it is worth while to ask again. A wait that fails is no error: the next question tells.
func (b *Backend) wait(ctx context.Context, key string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	defer context.AfterFunc(b.open, cancel)()
	if _, _, err := b.post(ctx, "wait", call{Key: key, TTL: waitFor}); err != nil {
		<-ctx.Done()
	}
}

// Extend implements [locker.Locker].
func (b *Backend) Extend(ctx context.Context, lease locker.Lease) (locker.Lease, error) {
	start, err := b.settle(ctx, "extend", lease)
	if err == nil {
		lease.Start = start
	}
	return lease, err
}

// Release implements [locker.Locker].
func (b *Backend) Release(ctx context.Context, lease locker.Lease) error {
	_, err := b.settle(ctx, "release", lease)
	return err
}

// settle asks for what only the holder of a lease is given. It has three outcomes: nil, ErrLost, and not known.
func (b *Backend) settle(ctx context.Context, op string, lease locker.Lease) (start time.Time, err error) {
	cleanUp := lease.Token == 0 && lease.State == nil
	if !cleanUp && lease.State != b.server {
		return start, failed(op, lease.Key, errors.New("the lease is of another server: use the Locker that granted it"))
	}
	a, start, err := b.post(ctx, op, call{Key: lease.Key, ID: lease.ID, Token: lease.Token, TTL: lease.TTL})
	switch {
	case err != nil:
		return start, failed(op, lease.Key, err)
	case a.Outcome == lost:
		return start, locker.ErrLost
	}
	return start, nil
}

// post sends one request. Start is read before it is sent, because the server may act on it at any moment after.
func (b *Backend) post(ctx context.Context, op string, c call) (a answer, start time.Time, err error) {
	b.calls.RLock()
	defer b.calls.RUnlock()
	if err := cmp.Or(context.Cause(b.open), ctx.Err()); err != nil {
		return a, start, err
	}
	body, err := json.Marshal(c)
	if err != nil {
		return a, start, err
	}
	sending, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.open, cancel)()
	req, err := http.NewRequestWithContext(sending, http.MethodPost, b.server+op, bytes.NewReader(body))
	if err != nil {
		return a, start, err
	}
	via := &b.asks
	if op == "wait" {
		via = &b.waits
	}
	start = time.Now()
	if a, err = roundTrip(via, req); err != nil {
		err = cmp.Or(context.Cause(b.open), ctx.Err(), err) // the reason, rather than what it did to the connection
	}
	return a, start, err
}

// roundTrip reads the answer to its end, so that the connection can be used again.
func roundTrip(via *http.Client, req *http.Request) (a answer, err error) {
	resp, err := via.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // without the URL
		}
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return a, err
	}
	_ = json.Unmarshal(body, &a) // what cannot be read has no outcome
	switch a.Outcome {
	case done, held, lost:
		return a, nil
	case withdrawn:
		return a, errors.New("the request is over, and came too late: ask again with a new ID")
	}
	return a, fmt.Errorf("the server answered %s, and nothing that a lock server says", resp.Status)
}

// Capabilities implements [locker.Locker].
func (b *Backend) Capabilities() locker.Capabilities {
	return locker.Capabilities{
		Backend: "httplock", MinTTL: locker.MinTTL,
		EarlyFree: locker.EarlyFreeRestart, Fencing: locker.FencingCrash,
		Notifies: true, Fallback: 2 * time.Second, Labels: true,
	}
}

// Close implements [locker.Locker].
func (b *Backend) Close() error {
	b.close(locker.ErrClosed)
	b.calls.Lock() // granted when no request is under way
	defer b.calls.Unlock()
	b.asks.CloseIdleConnections()
	b.waits.CloseIdleConnections()
	return nil
}

func failed(op, key string, err error) error {
	return &locker.Error{Op: op, Key: key, Backend: "httplock", Err: err}
}
