// Command bench puts the same load on this library, on others, and on bare server commands, in interleaved rounds of
// one run, and prints the medians with their ratio to this library. Only ratios within one run mean anything: the
// machine's speed drifts.
//
//	go run . [-server redis] [-scenario uncontended] [-peer locker,redislock] [-rounds 5] [-json] [-plots DIR]
//
// It starts private servers, unless -url names one.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"time"
)

type settings struct {
	servers, scenario, peers string
	rounds                   int
	url                      string
	json                     bool
	plots                    string
	quick                    bool
}

func main() {
	var s settings
	flag.StringVar(&s.servers, "server", "", "only servers of these sorts, separated by commas: "+names(systems, system.title))
	flag.StringVar(&s.scenario, "scenario", "", "only scenarios whose name contains this")
	flag.StringVar(&s.peers, "peer", "", "only these peers, by name, separated by commas")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds of every scenario and peer; the median counts")
	flag.StringVar(&s.url, "url", "", "use this server instead of a private one; needs -server")
	flag.BoolVar(&s.json, "json", false, "print every round as JSON, a line for each scenario, instead of tables")
	flag.StringVar(&s.plots, "plots", "", "draw the results into this folder, too")
	flag.BoolVar(&s.quick, "quick", false, "small loads that only show that everything works")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if job, isWorker := os.LookupEnv(workerJob); isWorker {
		err = work(ctx, job, os.Stdin, os.Stdout)
	} else {
		err = run(ctx, s, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// result is what one peer did in one scenario.
type result struct {
	Server, Scenario, Figure, Unit, Peer string
	Rounds                               []value
	Error                                string `json:",omitempty"` // why it could not
	lessIsMore                           bool
}

// value is a figure; not a number where something never happened.
type value float64

// MarshalJSON writes null for what is not a number.
func (v value) MarshalJSON() ([]byte, error) {
	if math.IsNaN(float64(v)) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(v))
}

func (r result) median() float64 { return r.percentile(50) }

func (r result) percentile(p int) float64 {
	values := make([]float64, len(r.Rounds))
	for i, v := range r.Rounds {
		values[i] = float64(v)
	}
	return percentile(values, p)
}

func run(ctx context.Context, s settings, out io.Writer) error {
	if s.rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	if s.url != "" && !slices.ContainsFunc(systems, func(sys system) bool { return sys.name == s.servers }) {
		return errors.New("-url needs -server with one of " + names(systems, system.title))
	}
	if !s.json {
		fmt.Fprintf(out, "%s/%s, %d processors, %s, median of %d interleaved rounds\n",
			runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), s.rounds)
	}
	done := 0
	for _, sys := range systems {
		if s.servers != "" && !slices.Contains(strings.Split(s.servers, ","), sys.name) {
			continue
		}
		n, err := sys.measure(ctx, s, out)
		if err != nil {
			return fmt.Errorf("%s: %w", sys.name, err)
		}
		done += n
	}
	if done == 0 {
		return errors.New("no server, scenario or peer has such a name; peers: " + names(systems, func(sys system) string { return names(sys.peers, peer.title) }))
	}
	return nil
}

func (sys system) title() string { return sys.name }
func (p peer) title() string     { return p.name }

// names lists what there is to choose from.
func names[T any](all []T, name func(T) string) string {
	var list []string
	for _, one := range all {
		list = append(list, name(one))
	}
	return strings.Join(list, ", ")
}

// measure runs the scenarios on one server, and tells how many.
func (sys system) measure(ctx context.Context, s settings, out io.Writer) (done int, err error) {
	b := &bench{system: sys, url: s.url, quick: s.quick, run: time.Now().UnixMicro()}
	if b.url == "" {
		var stop func() error
		if b.url, stop, err = sys.start(ctx); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	if b.monitor, err = sys.watch(ctx, b.url); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.monitor.close()) }()
	for _, sc := range sys.runs() {
		peers := slices.DeleteFunc(slices.Clone(sys.peers), func(p peer) bool {
			return p.floor && !sc.floors || s.peers != "" && !slices.Contains(strings.Split(s.peers, ","), p.name)
		})
		if !strings.Contains(sc.name, s.scenario) || len(peers) == 0 {
			continue
		}
		results := b.rounds(ctx, sc, peers, s.rounds)
		if err := ctx.Err(); err != nil {
			return done, err
		}
		done++
		if s.json {
			err = json.NewEncoder(out).Encode(results)
		} else {
			err = table(out, results)
		}
		if err == nil && s.plots != "" {
			err = plot(s.plots, results)
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// rounds runs one scenario: every peer once in each round, in turn, so that a slow minute hits all of them.
func (b *bench) rounds(ctx context.Context, sc scenario, peers []peer, rounds int) []result {
	results := make([]result, len(peers)*len(sc.figures))
	failed := make([]string, len(peers))
	for range rounds {
		for i, p := range peers {
			if failed[i] != "" {
				continue
			}
			runtime.GC()
			values, err := sc.run(ctx, b, p)
			if err != nil {
				failed[i] = err.Error()
			}
			for j, f := range sc.figures {
				r := &results[j*len(peers)+i]
				*r = result{b.system.name, sc.name, f.name, f.unit, p.name, r.Rounds, failed[i], f.lessIsMore}
				if err == nil {
					r.Rounds = append(r.Rounds, value(values[j]))
				}
			}
		}
	}
	return results
}
