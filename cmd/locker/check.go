package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
)

var checkCommand = &command{
	name:  "check",
	args:  "[URL]",
	short: "check that a lock server keeps its promises",
	long: `
Runs the conformance suite of this library against a live server: work under locks while links are cut, hang and lose
answers, holders that are killed and stopped, late requests, and whatever else has gone wrong somewhere. It prints a line for each
property. It uses keys of its own, which begin with conformance/, touches no others, and leaves none: what a server keeps of
released locks against late requests is gone 15 seconds later. Properties for which the server itself would have to be stopped
or restarted are skipped. The exit code is 1 if a promise was broken.

A run takes about 30 times the TTL, and up to 75 connections on a server whose locks live in sessions. The network between here and there is part of what is measured; on a busy machine set
CI=true, which gives the properties that compare clocks five times as much room.`,
	lines: `
  locker check redis://db1:6379
  locker check --json file: | jq -c 'select(.outcome == "failed")'`,
	define: func(fs *flag.FlagSet) func(context.Context, []string) error {
		url := urlFlag(fs)
		ttl := fs.Duration("ttl", 2*time.Second, "the TTL of the locks: the shortest `DURATION` that the server keeps precisely")
		atOnce := fs.Int("at-once", 4, "how many properties are looked at at the same time: with `NUMBER` 16 it is faster, with 1 it needs the fewest connections")
		asJSON := fs.Bool("json", false, "print a line of JSON for each property, and one for the summary")
		return func(ctx context.Context, args []string) error {
			if err := oneURL(url, args); err != nil {
				return err
			}
			if *ttl < 500*time.Millisecond || *ttl > time.Minute {
				return usageError{fmt.Errorf("--ttl %v: give one between 500ms and 1m", *ttl)}
			}
			if *atOnce < 1 || *atOnce > 64 {
				return usageError{fmt.Errorf("--at-once %d: give one between 1 and 64", *atOnce)}
			}
			return check(ctx, urlOf(*url), *ttl, *atOnce, *asJSON)
		}
	},
}

// oneURL takes the URL from the arguments.
func oneURL(url *string, args []string) error {
	if len(args) > 1 || len(args) == 1 && *url != "" {
		return usageError{errors.New("give one URL, behind the flags")}
	}
	if len(args) == 1 {
		*url = args[0]
	}
	return nil
}

// serveURL makes this program a holder for check, on that server.
const serveURL = "LOCKER_CHECK_SERVE"

// opener opens Lockers whose traffic goes through the suite's network. A backend without connections is wrapped.
func opener(url string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		l, err := locker.OpenLocker(ctx, url, locker.Config{Dial: net.DialContext})
		if scheme := schemeOf(url); err == nil && (scheme == "file" || scheme == "mem") {
			l = net.Wrap(l)
		}
		return l, err
	}
}

func check(ctx context.Context, url string, ttl time.Duration, atOnce int, asJSON bool) error {
	ctx, stop := untilSignal(ctx)
	defer stop()
	operator, err := openAny(ctx, url)
	if err != nil {
		return err
	}
	defer operator.Close()
	seen := new(keys)
	h := conformance.Harness{TTL: ttl, AtOnce: atOnce, Open: func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		l, err := opener(url)(ctx, net)
		if err != nil {
			return nil, err
		}
		return noting{l, seen}, nil
	}}
	if breaker, ok := locker.As[locker.Breaker](operator); ok {
		h.Expire = func(ctx context.Context, lease locker.Lease) error {
			return breaker.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		}
	}
	if self, err := os.Executable(); err == nil && schemeOf(url) != "mem" { // another process has another memory
		h.Process = func(ctx context.Context) *exec.Cmd {
			cmd := exec.CommandContext(ctx, self)
			cmd.Env = append(os.Environ(), serveURL+"="+url)
			return cmd
		}
	}
	p := &progress{began: time.Now(), asJSON: asJSON, count: map[conformance.Outcome]int{}}
	defer p.start()()
	failure := conformance.Check(ctx, h, func(r conformance.Result) {
		if ctx.Err() == nil { // a row that was cut short says nothing
			p.row(r)
		}
	})
	freeing, freed := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer freed()
	unfreed := seen.free(freeing, operator)
	if err := interruptedBy(ctx); err != nil {
		return err
	}
	if p.count[conformance.Passed]+p.count[conformance.Failed] == 0 && failure != nil {
		return failure // it did not even begin
	}
	if err := p.summary(operator.Capabilities()); err != nil {
		return err
	}
	if unfreed != nil {
		fmt.Fprintf(os.Stderr, "locker check: keys under conformance/ are left on the server: %v\n", unfreed)
	}
	if failure != nil || unfreed != nil {
		return exitError(exitNo)
	}
	return nil
}

// keys are those that the suite has asked for.
type keys struct{ asked sync.Map }

// noting is a Locker that notes them.
type noting struct {
	locker.Locker
	keys *keys
}

func (n noting) Unwrap() locker.Locker { return n.Locker }

func (n noting) Acquire(ctx context.Context, req locker.Request) (locker.Lease, error) {
	n.keys.asked.Store(req.Key, nil)
	return n.Locker.Acquire(ctx, req)
}

// free takes away what the suite has left to expire: some of its locks last for a minute, and Redis knows released ones for
// days.
func (k *keys) free(ctx context.Context, operator locker.Locker) (err error) {
	breaker, ok := locker.As[locker.Breaker](operator)
	if !ok {
		return nil
	}
	k.asked.Range(func(key, _ any) bool {
		h, failure := inspect(ctx, operator, key.(string))
		if failure == nil && h.Token != 0 {
			failure = breaker.Break(ctx, h)
		}
		if failure == nil || errors.Is(failure, locker.ErrLost) {
			failure = forget(ctx, operator, key.(string))
		}
		err = errors.Join(err, failure)
		return true
	})
	return err
}

// forget makes a server that remembers released locks forget one. Waiters that were killed count for some seconds.
func forget(ctx context.Context, operator locker.Locker, key string) error {
	server, ok := locker.As[interface {
		Forget(ctx context.Context, key string) error
	}](operator)
	if !ok {
		return nil
	}
	pause := time.NewTicker(100 * time.Millisecond)
	defer pause.Stop()
	for {
		err := server.Forget(ctx, key)
		if !errors.Is(err, locker.ErrHeld) {
			return err
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return err
		}
	}
}

// progress prints what the suite tells.
type progress struct {
	began  time.Time
	asJSON bool

	mu    sync.Mutex
	count map[conformance.Outcome]int
}

// start shows on a terminal that something is going on, until the function that it returns is called.
func (p *progress) start() (stop func()) {
	if p.asJSON || !isTerminal(os.Stderr) {
		return func() {}
	}
	ended, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				p.mu.Lock()
				done := p.count[conformance.Passed] + p.count[conformance.Failed] + p.count[conformance.Skipped]
				fmt.Fprintf(os.Stderr, "\r\x1b[K%s", colour(os.Stderr, faint, fmt.Sprintf("… %d properties seen, %.0f s", done, time.Since(p.began).Seconds())))
				p.mu.Unlock()
			case <-ended:
				return
			}
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() {
			close(ended)
			<-stopped
			fmt.Fprint(os.Stderr, "\r\x1b[K")
		})
	}
}

// row prints a result.
func (p *progress) row(r conformance.Result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count[r.Outcome]++
	if p.asJSON {
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{
			"property": r.Row, "outcome": r.Outcome.String(), "seconds": r.Took.Seconds(), "clause": r.Clause, "seen": r.Seen,
		})
		return
	}
	if isTerminal(os.Stderr) {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	mark := map[conformance.Outcome]string{
		conformance.Passed: colour(os.Stdout, green, "passed "), conformance.Failed: colour(os.Stdout, red, "FAILED "),
		conformance.Skipped: colour(os.Stdout, faint, "skipped"),
	}[r.Outcome]
	fmt.Fprintf(os.Stdout, "%s  %6.2f s  %s\n", mark, r.Took.Seconds(), r.Row)
	seen := strings.TrimSpace(r.Seen)
	switch r.Outcome {
	case conformance.Passed:
	case conformance.Failed:
		fmt.Fprintf(os.Stdout, "    clause: %s\n    seen:   %s\n", r.Clause, strings.ReplaceAll(seen, "\n", "\n            "))
	case conformance.Skipped:
		fmt.Fprintf(os.Stdout, "    %s\n", colour(os.Stdout, faint, seen))
	}
}

// summary prints the counts and what the backend promises.
func (p *progress) summary(caps locker.Capabilities) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	passed, failed, skipped := p.count[conformance.Passed], p.count[conformance.Failed], p.count[conformance.Skipped]
	if p.asJSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{
			"passed": passed, "failed": failed, "skipped": skipped, "seconds": time.Since(p.began).Seconds(),
			"capabilities": map[string]any{
				"backend": caps.Backend, "min_ttl": caps.MinTTL.String(), "granularity": caps.Granularity.String(),
				"expiry": caps.Expiry.String(), "early_free": caps.EarlyFree.String(), "fair": caps.Fair, "notifies": caps.Notifies,
				"fallback": caps.Fallback.String(), "fencing": caps.Fencing.String(), "reports_loss": caps.ReportsLoss, "labels": caps.Labels,
			},
		})
	}
	text := fmt.Sprintf("%d passed, %d failed, %d skipped in %.1f s", passed, failed, skipped, time.Since(p.began).Seconds())
	if failed > 0 {
		text = colour(os.Stdout, red, text)
	}
	fallback := "the TTL"
	if caps.Fallback > 0 {
		fallback = caps.Fallback.String()
	}
	if isTerminal(os.Stderr) {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	_, err := fmt.Fprintf(os.Stdout, `
%s

The backend %q promises:
  shortest TTL                     %v, in steps of %v
  frees a dead holder's lock       at most %v after its TTL
  frees locks early on             %v
  tokens grow over                 %v
  serves waiters in their order    %t
  wakes waiters                    %t; a lost wake-up or dead waiter delays by %s at most
  tells of a lock taken away       %t
  tells who holds a lock           %t
`, text, caps.Backend, caps.MinTTL, caps.Granularity, caps.Expiry, caps.EarlyFree, caps.Fencing, caps.Fair, caps.Notifies, fallback, caps.ReportsLoss, caps.Labels)
	return err
}
