// Command locker holds a lock while a command runs, shows who holds what, takes locks away, and checks and measures lock
// servers. See docs/command.md, or run it without arguments.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"

	_ "github.com/fec20105/locker/filebackend"
	_ "github.com/fec20105/locker/membackend"
	_ "github.com/fec20105/locker/pgbackend"
	_ "github.com/fec20105/locker/redisbackend"
)

// The exit codes that are not a command's own: those of sysexits.h and of the shell.
const (
	exitOK          = 0
	exitNo          = 1   // show: nobody holds the lock; check: the server broke a promise
	exitUsage       = 64  // what was given is wrong: the command line, the URL, the folder of the locks
	exitUnavailable = 69  // the lock server cannot be reached, or something else went wrong
	exitHeld        = 75  // the lock was not acquired
	exitLost        = 76  // the lock was lost while the command ran
	exitCannotRun   = 126 // the command cannot be executed
	exitNotFound    = 127 // there is no such command
	exitSignal      = 128 // plus the signal that killed the command
)

// command is one of the words behind locker.
type command struct {
	name  string
	args  string // behind the flags
	short string // one line
	long  string // what it does
	lines string // examples
	// define adds the flags and returns what runs when they are parsed.
	define func(fs *flag.FlagSet) func(ctx context.Context, args []string) error
}

// commands in the order in which people meet them.
func commands() []*command {
	return []*command{runCommand, showCommand, breakCommand, checkCommand, benchCommand, completionCommand()}
}

func main() {
	if url := os.Getenv(serveURL); url != "" { // a holder that check kills and stops
		if err := conformance.Serve(context.Background(), opener(url)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitUnavailable)
		}
		os.Exit(exitOK)
	}
	os.Exit(dispatch(context.Background(), os.Args[1:]))
}

// dispatch runs one command and returns the exit code.
func dispatch(ctx context.Context, args []string) int {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, overview())
		return exitUsage
	}
	switch args[0] {
	case "help", "--help", "-help", "-h":
		return help(args[1:])
	case "version", "--version", "-version":
		fmt.Println(version())
		return exitOK
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.execute(ctx, args[1:])
		}
	}
	return complain("locker", usageError{fmt.Errorf("there is no command %q: see locker help", args[0])})
}

func (c *command) execute(ctx context.Context, args []string) int {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	run := c.define(fs)
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(c.help())
		return exitOK
	case err != nil:
		err = usageError{errors.New(strings.NewReplacer("flag provided but not defined: -", "unknown flag --", " for flag -", " for --").Replace(err.Error()))}
	default:
		err = run(ctx, fs.Args())
	}
	return complain("locker "+c.name, err)
}

// usageError is a mistake on the command line.
type usageError struct{ error }

// exitError ends the program with a code, after it has said all there is to say.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func schemeOf(url string) string {
	scheme, _, _ := strings.Cut(url, ":")
	return strings.ToLower(scheme)
}

// untilSignal is a ctx that ends with the first Ctrl-C or SIGTERM, so that what is held is given back. A second one kills.
func untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		select {
		case s := <-signals:
			signal.Stop(signals)
			end(exitError(exitSignal + int(s.(syscall.Signal))))
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		end(nil)
	}
}

// interruptedBy is the exit code of a ctx that a signal has ended, or nil.
func interruptedBy(ctx context.Context) error {
	if code, ok := context.Cause(ctx).(exitError); ok { //nolint:errorlint // the very cause we set
		return code
	}
	return nil
}

// complain says what went wrong, and returns the exit code.
func complain(who string, err error) int {
	if err == nil {
		return exitOK
	}
	if code, ok := errors.AsType[exitError](err); ok {
		return int(code)
	}
	if usage, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(os.Stderr, "%s: %v (%s --help tells more)\n", who, usage.error, who)
		return exitUsage
	}
	fmt.Fprintf(os.Stderr, "%s: %s\n", who, strings.TrimPrefix(err.Error(), "locker: "))
	if badInput(err) {
		return exitUsage
	}
	return exitUnavailable
}

// urlFlag is --url, which every command has that talks to a server.
func urlFlag(fs *flag.FlagSet) *string {
	return fs.String("url", "", "where the locks are: a `URL`, by default $LOCKER_URL, else file:, this user's own folder on this host")
}

func urlOf(flag string) string {
	for _, url := range []string{flag, os.Getenv("LOCKER_URL")} {
		if url != "" {
			return url
		}
	}
	return "file:"
}

// openLocker opens a backend for locks that other processes see too.
func openLocker(ctx context.Context, url string) (locker.Locker, error) {
	if schemeOf(url) == "mem" {
		return nil, usageError{errors.New("locks at mem:// are within one process and exclude no other: use file: or a server (check and bench take mem://)")}
	}
	return openAny(ctx, url)
}

func openAny(ctx context.Context, url string) (locker.Locker, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	l, err := locker.OpenLocker(ctx, url, locker.Config{})
	return l, withoutEtcd(url, err)
}

// withoutEtcd says how to get what is not in this program.
func withoutEtcd(url string, err error) error {
	if s := schemeOf(url); err == nil || s != "etcd" && s != "etcds" || slices.Contains(locker.Schemes(), s) {
		return err
	}
	return usageError{errors.New("this program was built without etcd, whose client doubles the time that it takes to start: " +
		"CGO_ENABLED=0 go install -tags etcd github.com/fec20105/locker/cmd/locker@latest")}
}

// badInput tells whether what was given is wrong: a URL, or a folder and what is in it. A server that cannot be reached is not.
func badInput(err error) bool {
	if _, network := errors.AsType[*net.OpError](err); network || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	e, ok := errors.AsType[*locker.Error](err)
	return ok && (e.Op == "open" || e.Backend == "file")
}
