// Command torture runs many processes that use a few locks, for a given time, while a nemesis stops and kills the processes, pauses,
// crashes and restarts the servers, and cuts, hangs, delays and resets the links. It judges what it sees:
//
//   - Of all processes at most one at a time believes to hold a lock, but for the evictions that Capabilities.EarlyFree names.
//   - Tokens only grow, and behind a guard that checks them no write is lost.
//   - Everybody gets every lock again soon after everything works again.
//   - Nothing is left behind: no process, no connection, no goroutine, no lock.
//
// Usage:
//
//	go run ./torture [-url URL | -backend redis,etcd] [-time 20s] [-seed N]
//
// Without -url it starts servers of its own, and tortures them too; without -backend, all that it can start, at the same time. The
// history of a run is a file with a line of JSON for each event; when a promise was broken the shortest telling excerpt, the seed
// and a picture are shown. The exit code is 1 then, 64 for a wrong command line, 69 if a server cannot be used, 130 after
// Ctrl-C or SIGTERM.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The exit codes, as the command locker has them.
const (
	exitOK          = 0
	exitViolation   = 1
	exitUsage       = 64
	exitUnavailable = 69
	exitInterrupted = 130
)

func main() {
	if text, ok := os.LookupEnv(workerJob); ok {
		if err := work(text, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "torture: worker:", err)
			os.Exit(exitUnavailable)
		}
		os.Exit(exitOK)
	}
	os.Exit(command(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// command is the program.
func command(ctx context.Context, args []string, out, errs io.Writer) int {
	var s settings
	flags := flag.NewFlagSet("torture", flag.ContinueOnError)
	flags.SetOutput(errs)
	url := flags.String("url", "", "torture locks at this `URL`; its server itself is left alone")
	names := flags.String("backend", "", "torture locks on servers of its own: some of "+backendNames()+"; all, if there is no -url")
	flags.DurationVar(&s.Time, "time", 20*time.Second, "for how long")
	flags.Uint64Var(&s.Seed, "seed", 0, "throws the dice for load and faults as in another run, though what they hit depends on the machine; 0 chooses one")
	flags.IntVar(&s.Processes, "processes", 5, "how many processes use the locks")
	flags.IntVar(&s.Keys, "keys", 3, "how many locks they use")
	flags.DurationVar(&s.TTL, "ttl", time.Second, "the TTL of the locks; it is raised to the least of the backend")
	flags.StringVar(&s.Broken, "broken", "", "break the locks on purpose, to see it found: "+brokenNames())
	flags.StringVar(&s.Out, "out", "", "keep the histories in this `folder`; by default they are kept only if a promise was broken")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	}
	starts, err := choose(flags.Args(), *url, *names, &s)
	if err != nil {
		fmt.Fprintln(errs, "torture:", err)
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	kept := s.Out
	if kept == "" {
		s.Out, err = os.MkdirTemp("", "locker-torture-")
	} else {
		err = os.MkdirAll(kept, 0o755)
	}
	if err != nil {
		fmt.Fprintln(errs, "torture:", err)
		return exitUnavailable
	}
	var mu sync.Mutex
	code := exitOK
	var all sync.WaitGroup
	for _, b := range starts {
		all.Go(func() {
			r, err := one(ctx, s, b)
			mu.Lock()
			defer mu.Unlock()
			if _, broken := errors.AsType[*violation](err); !broken && ctx.Err() != nil {
				return // the signal says it
			}
			if own := report(out, errs, b.name, s, r, err); own == exitViolation || code == exitOK {
				code = own
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil && code == exitOK {
		code = exitInterrupted
	}
	switch {
	case kept != "":
		fmt.Fprintln(out, "the histories are in", kept)
	case code != exitViolation:
		_ = os.RemoveAll(s.Out)
	}
	return code
}

// choose finds what to torture, and says what is wrong with what was given.
func choose(args []string, url, names string, s *settings) (starts []starter, err error) {
	switch {
	case runtime.GOOS != "linux":
		return nil, errors.New("this needs Linux, where all processes read one clock that counts suspend")
	case len(args) > 0:
		return nil, fmt.Errorf("%q is no flag", args[0])
	case url != "" && names != "":
		return nil, errors.New("give -url or -backend, not both")
	case s.Processes < 1 || s.Processes > 100 || s.Keys < 1 || s.Keys > 1000:
		return nil, errors.New("give 1 to 100 -processes and 1 to 1000 -keys")
	case s.TTL < 100*time.Millisecond || s.TTL > time.Minute:
		return nil, errors.New("give a -ttl between 100ms and 1m")
	case s.Broken != "" && broken[s.Broken] == nil:
		return nil, fmt.Errorf("-broken %s: known are %s", s.Broken, brokenNames())
	case strings.HasPrefix(url, "mem:"):
		return nil, errors.New("locks at mem:// are within one process: there is nothing to torture")
	}
	if s.Seed == 0 {
		s.Seed = 1 + uint64(rand.Uint32())
	}
	if url != "" {
		return []starter{{"url", func(context.Context, time.Duration) (*target, error) {
			return &target{url: url, given: true, stop: func() error { return nil }}, nil
		}}}, nil
	}
	for name := range strings.SplitSeq(cmp.Or(names, backendNames()), ",") {
		i := slices.IndexFunc(backends, func(b starter) bool { return b.name == name })
		if i < 0 {
			return nil, fmt.Errorf("-backend %q: known are %s", name, backendNames())
		}
		starts = append(starts, backends[i])
	}
	return starts, nil
}

// one tortures one target.
func one(ctx context.Context, s settings, b starter) (*run, error) {
	t, err := b.start(ctx, s.TTL)
	if err != nil {
		return nil, err
	}
	t.name = b.name
	r, err := torture(ctx, s, t)
	return r, errors.Join(err, t.stop())
}
