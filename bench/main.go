// Command bench puts the same load on this library, on others, and on bare server commands, in interleaved rounds of
// one run, and prints the medians with their ratio to this library. Only ratios within one run mean anything: the machine's speed
// drifts.
//
//	go run . [-rounds 5] [-scenario uncontended] [-peer locker,redislock] [-url redis://127.0.0.1:6379]
//
// Without -url it starts a private server.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/fec20105/locker/internal/servertest"
)

type settings struct {
	rounds         int
	scenario, peer string
	url            string
	json           bool
}

func main() {
	var s settings
	flag.IntVar(&s.rounds, "rounds", 5, "rounds of every scenario and peer; the median counts")
	flag.StringVar(&s.scenario, "scenario", "", "only scenarios whose name contains this")
	flag.StringVar(&s.peer, "peer", "", "only these peers, by name, separated by commas")
	flag.StringVar(&s.url, "url", "", "use this Redis instead of a private one")
	flag.BoolVar(&s.json, "json", false, "print every round as JSON, a line for each scenario, instead of tables")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// result is what one peer did in one scenario.
type result struct {
	Scenario, Figure, Unit, Peer string
	Rounds                       []float64
	lessIsMore                   bool
}

func (r result) median() float64 { return percentile(slices.Clone(r.Rounds), 50) }

func run(ctx context.Context, s settings, out io.Writer) (err error) {
	if s.rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	if s.url == "" {
		server, err := servertest.StartRedis(ctx, servertest.RedisOptions{Private: true, Args: []string{"--appendonly", "no"}})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, server.Stop()) }()
		s.url = server.URL
	}
	u, err := url.Parse(s.url)
	if err != nil {
		return errors.New("-url cannot be parsed")
	}
	b := &bench{url: s.url, server: newMonitor(u.Host)}
	defer func() { err = errors.Join(err, b.server.close()) }()

	if !s.json {
		fmt.Fprintf(out, "%s/%s, %d processors, %s, median of %d interleaved rounds\n",
			runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version(), s.rounds)
	}
	done := 0
	for _, sc := range scenarios {
		peers := chosen(s.peer, sc)
		if !strings.Contains(sc.name, s.scenario) || len(peers) == 0 {
			continue
		}
		results, err := b.measure(ctx, sc, peers, s.rounds)
		if err != nil {
			return err
		}
		if done++; s.json {
			err = json.NewEncoder(out).Encode(results)
		} else {
			err = table(out, results)
		}
		if err != nil {
			return err
		}
	}
	if done == 0 {
		return errors.New("no scenario or no peer has such a name")
	}
	return nil
}

func chosen(names string, sc scenario) []peer {
	return slices.DeleteFunc(slices.Clone(redisPeers), func(p peer) bool {
		return p.floor && !sc.floors || names != "" && !slices.Contains(strings.Split(names, ","), p.name)
	})
}

// measure runs one scenario in rounds: every peer once in each, in turn, so that a slow minute hits all of them.
func (b *bench) measure(ctx context.Context, sc scenario, peers []peer, rounds int) ([]result, error) {
	results := make([]result, len(peers)*len(sc.figures))
	for range rounds {
		for i, p := range peers {
			runtime.GC()
			values, err := sc.run(ctx, b, p)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", sc.name, p.name, err)
			}
			for j, f := range sc.figures {
				r := &results[j*len(peers)+i]
				*r = result{sc.name, f.name, f.unit, p.name, append(r.Rounds, values[j]), f.lessIsMore}
			}
		}
	}
	return results, nil
}

func table(out io.Writer, results []result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	heading := ""
	var ours float64
	for _, r := range results {
		if h := r.Scenario + ": " + r.Figure; h != heading {
			heading = h
			better := "more is better"
			if r.lessIsMore {
				better = "less is better"
			}
			fmt.Fprintf(w, "\n%s (%s)\n", h, better)
			ours = r.median()
		}
		ratio := "-"
		if theirs := r.median(); theirs > 0 {
			ratio = fmt.Sprintf("locker / it: %.2f", ours/theirs)
		}
		fmt.Fprintf(w, "  %s\t%.4g %s\t(%.4g to %.4g)\t%s\n", r.Peer, r.median(), r.Unit, slices.Min(r.Rounds), slices.Max(r.Rounds), ratio)
	}
	return w.Flush()
}
