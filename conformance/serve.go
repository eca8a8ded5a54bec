package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/fec20105/locker"
)

// command is one line that a row writes to a child process.
type command struct {
	Do  string        // "acquire", "extend", "err", "release"
	Key string        // of the lock
	TTL time.Duration `json:",omitempty"` // of an acquire
}

// answer is the line that the child writes back.
type answer struct {
	Error    string    `json:",omitempty"` // what the call returned; for "err": what Lock.Err says
	Lost     bool      `json:",omitempty"` // the error matches ErrLost
	Held     bool      `json:",omitempty"` // the error matches ErrHeld
	Token    uint64    `json:",omitempty"`
	Deadline time.Time `json:",omitzero"` // of the lock after the call
}

// Serve is the main function of the process that Harness.Process starts. It obeys the commands on standard input, with
// a Client over the Locker that open makes, and answers on standard output, until its input ends. Like any process it
// can then be killed or stopped while it holds locks. open is the harness's.
func Serve(ctx context.Context, open func(context.Context, *Network) (locker.Locker, error)) error {
	return serve(ctx, open, os.Stdin, os.Stdout)
}

func serve(ctx context.Context, open func(context.Context, *Network) (locker.Locker, error), in io.Reader, out io.Writer) (err error) {
	net := NewNetwork()
	defer func() { err = errors.Join(err, net.Close()) }()
	l, err := open(ctx, net)
	if err != nil {
		return fmt.Errorf("conformance: the child process cannot open a Locker: %w", err)
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	client, err := locker.New(l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()

	locks := make(map[string]*locker.Lock)
	commands, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var c command
		if err := commands.Decode(&c); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("conformance: the child process got a command that it cannot read: %w", err)
		}
		if err := answers.Encode(obey(ctx, client, locks, c)); err != nil {
			return fmt.Errorf("conformance: the child process cannot answer: %w", err)
		}
	}
}

// obey does what one command says.
func obey(ctx context.Context, client *locker.Client, locks map[string]*locker.Lock, c command) answer {
	lock, err := locks[c.Key], error(nil)
	switch {
	case c.Do == "acquire":
		if lock, err = client.Acquire(ctx, c.Key, locker.WithTTL(c.TTL), locker.WithNoWait()); err == nil {
			locks[c.Key] = lock
		}
	case lock == nil:
		err = fmt.Errorf("%q was never acquired by this process", c.Key)
	case c.Do == "extend":
		err = lock.Extend(ctx)
	case c.Do == "err":
		err = lock.Err()
	case c.Do == "release":
		err = lock.Release(ctx)
	default:
		err = fmt.Errorf("unknown command %q", c.Do)
	}
	var a answer
	if err != nil {
		a.Error, a.Lost, a.Held = err.Error(), errors.Is(err, locker.ErrLost), errors.Is(err, locker.ErrHeld)
	}
	if lock != nil {
		a.Token, a.Deadline = lock.Token(), lock.Deadline()
	}
	return a
}
