package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/fec20105/locker"
)

var runCommand = &command{
	name:  "run",
	args:  "-- COMMAND [ARGUMENT…]",
	short: "hold a lock while a command runs",
	long: `
Waits for the lock, holds it under a heartbeat while COMMAND runs, and releases it when COMMAND ends. Standard input,
output and error, the terminal and signals are the command's. It finds LOCKER_KEY, LOCKER_TOKEN and LOCKER_TTL in
its environment; the token is greater than that of every earlier holder, so that what the command writes to can
refuse late writers. Others see the command line (locker show): secrets do not belong there.

The command never outlives its lock. When renewals keep failing, its process group gets SIGTERM --grace before the lock
can be given to somebody else, and SIGKILL at that moment. When the lock was taken away (locker break, a server without its
memory, --max-hold) it gets SIGTERM at once and SIGKILL after --grace. Then --on-lost runs, and the exit code is 76.

Should locker itself be killed, the command's process group is killed with it: by the kernel's parent-death signal, on
Linux, and by a small shell that waits for it. The lock ends with its TTL then. Processes that leave the group
(setsid, daemons) are out of reach, and what the command leaves running in the background when it ends is not waited for.
Ctrl-Z stops the command with locker. While locker is stopped it renews nothing: should the lock end meanwhile, the command
does not go on. A SIGSTOP to locker alone leaves the command running, and nobody to stop it.`,
	lines: `
  locker run -- ./nightly-report.sh
        on this host, one at a time; others wait

  locker run --key report --no-wait -- ./nightly-report.sh
        if somebody else holds the lock, exit with 75 at once

  locker run --wait 1m --max-hold 1h --on-lost './undo.sh' -- ./migrate.sh
        wait a minute at most, hold for an hour at most, and undo what was done when the lock was lost

  locker run --url redis://db1:6379 --ttl 30s -- ./deploy.sh
        among all hosts that use this Redis; when a host dies, its lock is free after half a minute`,
	define: func(fs *flag.FlagSet) func(context.Context, []string) error {
		var o runOptions
		o.url = urlFlag(fs)
		fs.StringVar(&o.key, "key", "", "the lock's `NAME`; by default the command with its arguments")
		fs.DurationVar(&o.ttl, "ttl", 15*time.Second, "how long others wait for a holder that has died: a `DURATION` such as 30s")
		fs.DurationVar(&o.wait, "wait", 0, "how long to wait for the lock: a `DURATION`; by default as long as it takes")
		fs.BoolVar(&o.noWait, "no-wait", false, "do not wait")
		fs.DurationVar(&o.maxHold, "max-hold", 0, "take the lock away from a command that takes longer than this `DURATION`")
		fs.DurationVar(&o.grace, "grace", 0, "the time between SIGTERM and SIGKILL: a `DURATION`; by default a third of the TTL")
		fs.StringVar(&o.onLost, "on-lost", "", "a `COMMAND` line for sh that undoes what was done, when the lock was lost: it runs once, when the command has ended")
		return func(ctx context.Context, args []string) error {
			given := map[string]bool{}
			fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
			return o.run(ctx, args, given)
		}
	},
}

type runOptions struct {
	url                       *string
	key                       string
	ttl, wait, maxHold, grace time.Duration
	noWait                    bool
	onLost                    string
	warned                    chan struct{} // gets a value when renewals keep failing
	signals                   chan os.Signal
	argv                      []string
	path                      string // of the command's program
	interrupted               bool   // see end
}

// check refuses what makes no sense, before anything is done.
func (o *runOptions) check(args []string, given map[string]bool) error {
	switch {
	case len(args) == 0:
		return usageError{errors.New("there is no command: write it behind --, as in locker run -- sleep 1")}
	case given["ttl"] && (o.ttl < locker.MinTTL || o.ttl > locker.MaxTTL):
		return usageError{fmt.Errorf("--ttl %v: a TTL is between %v and %v", o.ttl, locker.MinTTL, locker.MaxTTL)}
	case given["wait"] && o.noWait:
		return usageError{errors.New("--wait and --no-wait contradict each other: give one")}
	case given["wait"] && o.wait <= 0:
		return usageError{fmt.Errorf("--wait %v: give a time to wait, or --no-wait", o.wait)}
	case given["max-hold"] && o.maxHold <= 0:
		return usageError{fmt.Errorf("--max-hold %v: give a time, or leave it out", o.maxHold)}
	case given["grace"] && (o.grace <= 0 || o.grace > o.ttl*2/3):
		return usageError{fmt.Errorf("--grace %v: give more than nothing and at most two thirds of the TTL (%v)", o.grace, o.ttl)}
	case given["key"] && o.key == "":
		return usageError{errors.New("--key is empty: name the lock, or leave it out")}
	}
	if o.grace == 0 {
		o.grace = o.ttl / 3
	}
	if o.key == "" {
		o.key = strings.Join(args, " ")
		if len(o.key) > locker.MaxKeyLength || !utf8.ValidString(o.key) {
			return usageError{errors.New("the command is too long, or no UTF-8, to be the lock's name: give one with --key")}
		}
	}
	if err := (locker.Request{Key: o.key, ID: "x", TTL: o.ttl}).Validate(); err != nil {
		return usageError{err}
	}
	var err error
	if o.path, err = exec.LookPath(args[0]); err != nil {
		return cannotRun(args[0], err)
	}
	o.argv = args
	return nil
}

// cannotRun says why a command cannot run, with the shell's exit codes.
func cannotRun(name string, err error) error {
	code, why := exitCannotRun, err
	if e, ok := errors.AsType[*exec.Error](err); ok {
		why = e.Err
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code, why = exitNotFound, errors.New("no such command")
	}
	fmt.Fprintf(os.Stderr, "locker run: %s: %v\n", name, why)
	return exitError(code)
}

func (o *runOptions) run(ctx context.Context, args []string, given map[string]bool) error {
	if err := o.check(args, given); err != nil {
		return err
	}
	o.warned = make(chan struct{}, 1)
	o.signals = catchSignals()
	options := []locker.Option{
		locker.WithTTL(o.ttl),
		locker.WithHolder(label(args)),
		locker.WithWarning(o.grace, o.warn),
		locker.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))),
	}
	if o.noWait {
		options = append(options, locker.WithNoWait())
	}
	if o.wait > 0 {
		options = append(options, locker.WithWait(o.wait))
	}
	if o.maxHold > 0 {
		options = append(options, locker.WithMaxHold(o.maxHold))
	}
	l, err := openLocker(ctx, urlOf(*o.url))
	if err != nil {
		return err
	}
	defer func() {
		if o.interrupted {
			interrupt()
		}
	}()
	defer l.Close()
	client, err := locker.New(l, options...)
	if err != nil {
		return usageError{err}
	}
	defer client.Close()
	return o.hold(ctx, client)
}

// warn never blocks: the command may have ended.
func (o *runOptions) warn(*locker.Lock) {
	select {
	case o.warned <- struct{}{}:
	default:
	}
}

// hold runs the command under the lock.
func (o *runOptions) hold(ctx context.Context, client *locker.Client) error {
	// A signal that comes while we wait ends the wait.
	waiting, stopWaiting := context.WithCancelCause(ctx)
	defer stopWaiting(nil)
	acquired, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case s := <-o.signals:
				if endsWait(s) {
					stopWaiting(exitError(exitSignal + int(s.(syscall.Signal))))
					return
				}
			case <-acquired:
				return
			}
		}
	}()
	lock, err := client.Acquire(waiting, o.key)
	close(acquired)
	<-watched
	if code, ok := context.Cause(waiting).(exitError); ok { //nolint:errorlint // the very cause we set
		if err == nil {
			_ = lock.Release(ctx) // nothing has run: if it fails the lock ends with its TTL
		}
		return code
	}
	if err != nil {
		return o.notAcquired(err)
	}

	end := o.supervise(lock)
	err = lock.Release(ctx)
	lost, isLost := errors.AsType[*locker.LostError](err)
	if end.err != nil {
		return cannotRun(o.argv[0], end.err)
	}
	switch {
	case isLost:
		return o.lost(lost.Reason.String(), lost.Token)
	case end.stopped:
		return o.lost("expiring", lock.Token())
	case err != nil:
		fmt.Fprintf(os.Stderr, "locker run: the command is done, but the lock could not be released and ends with its TTL: %v\n", err)
	}
	o.interrupted = end.interrupted
	if end.code != exitOK {
		return exitError(end.code)
	}
	return nil
}

// notAcquired says who holds the lock.
func (o *runOptions) notAcquired(err error) error {
	if held, ok := errors.AsType[*locker.HeldError](err); ok {
		fmt.Fprintf(os.Stderr, "locker run: %s; not started: %s\n", strings.TrimPrefix(held.Error(), "locker: "), strings.Join(o.argv, " "))
		return exitError(exitHeld)
	}
	if errors.Is(err, locker.ErrHeld) { // a server that does not answer says nothing of that
		fmt.Fprintf(os.Stderr, "locker run: %q was not acquired within %v: %v\n", o.key, o.wait, err)
		return exitError(exitHeld)
	}
	return err
}

// lost says so, and runs the compensation.
func (o *runOptions) lost(reason string, token uint64) error {
	fmt.Fprintf(os.Stderr, "locker run: the lock %q (token %d) was lost: %s\n", o.key, token, reason)
	if o.onLost != "" {
		undo := exec.Command("sh", "-c", o.onLost) //nolint:noctx // it may take as long as it takes
		undo.Stdin, undo.Stdout, undo.Stderr = os.Stdin, os.Stdout, os.Stderr
		undo.Env = append(o.environment(token), "LOCKER_REASON="+reason)
		if err := undo.Run(); err != nil {
			fmt.Fprintf(os.Stderr, "locker run: --on-lost: %v\n", err)
		}
	}
	return exitError(exitLost)
}

// environment is the command's. What a lock around this one has put there goes: many programs take the first value of a name.
func (o *runOptions) environment(token uint64) []string {
	inherited := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"LOCKER_KEY", "LOCKER_TOKEN", "LOCKER_TTL", "LOCKER_REASON"}, name)
	})
	return append(inherited, "LOCKER_KEY="+o.key, fmt.Sprintf("LOCKER_TOKEN=%d", token), "LOCKER_TTL="+o.ttl.String())
}

// label tells others who holds the lock.
func label(args []string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	who := cmp.Or(os.Getenv("USER"), os.Getenv("LOGNAME"), fmt.Sprint("uid ", os.Getuid())) // for people: it proves nothing
	text := strings.ToValidUTF8(fmt.Sprintf("%s@%s pid %d: %s", who, host, os.Getpid(), strings.Join(args, " ")), "?")
	for len(text) > 200 { // enough to know it, and no more to read
		_, size := utf8.DecodeLastRuneInString(text)
		text = text[:len(text)-size]
	}
	return text
}

// catchSignals catches those that are passed on to the command. What this process was told to ignore (nohup) stays ignored.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 16)
	for _, s := range passedOn {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals
}

// end is how a command ended.
type end struct {
	code        int
	stopped     bool  // by us, because renewals kept failing
	interrupted bool  // by a Ctrl-C that nobody else has seen
	err         error // it could not be started
}
