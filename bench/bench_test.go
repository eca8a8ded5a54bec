package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fec20105/locker/internal/servertest"
)

func TestMain(m *testing.M) {
	if job, isWorker := os.LookupEnv(workerJob); isWorker {
		if err := work(context.Background(), job, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Every scenario runs on every server, and every figure of ours is a number.
func TestScenarios(t *testing.T) {
	for _, sys := range systems {
		t.Run(sys.name, func(t *testing.T) {
			t.Parallel()
			plots := t.TempDir()
			var out bytes.Buffer
			err := run(t.Context(), settings{servers: sys.name, peers: ours, rounds: 1, quick: true, json: true, plots: plots}, &out)
			if errors.Is(err, servertest.ErrMissing) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(lines) != len(sys.runs()) {
				t.Errorf("%d lines, want one for each of %d scenarios", len(lines), len(sys.runs()))
			}
			for i, line := range lines {
				var results []struct {
					Scenario, Figure, Peer, Error string
					Rounds                        []*float64
				}
				if err := json.Unmarshal([]byte(line), &results); err != nil {
					t.Fatal(err)
				}
				if len(results) != len(sys.runs()[i].figures) {
					t.Errorf("%s: %d results, want %d", sys.runs()[i].name, len(results), len(sys.runs()[i].figures))
				}
				for _, r := range results {
					if r.Peer != ours || r.Error != "" || len(r.Rounds) != 1 || r.Rounds[0] == nil {
						t.Errorf("%+v", r)
					}
					if strings.HasPrefix(r.Figure, "told before") && *r.Rounds[0] <= 0 {
						t.Errorf("the next holder had the lock %v ms before the holder was told", -*r.Rounds[0])
					}
				}
			}
			if drawn, err := filepath.Glob(plots + "/*.svg"); err != nil || len(drawn) != len(sys.runs()) {
				t.Errorf("%d plots, %v", len(drawn), err)
			}
		})
	}
}

// A peer that connects at its first call has no more connections than one that connects when it is opened.
func TestConnectionsAreCountedFromNone(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), settings{
		servers: "redis", scenario: "50 clients wait for one key", peers: "redislock", rounds: 1, quick: true, json: true,
	}, &out)
	if errors.Is(err, servertest.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	var results []result
	if err := json.Unmarshal(out.Bytes(), &results); err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.Figure == "connections per client" && (len(r.Rounds) != 1 || r.Rounds[0] < 0.9 || r.Rounds[0] > 1.5) {
			t.Errorf("each client of redislock has one connection, not %v", r.Rounds)
		}
	}
}

func TestWrongNames(t *testing.T) {
	for want, s := range map[string]settings{
		"peers: locker":    {servers: "redis", peers: "nobody", rounds: 1},
		"needs -server":    {url: "redis://127.0.0.1:1", rounds: 1},
		"must be at least": {},
		"no server,":       {servers: "nothing", rounds: 1},
	} {
		if err := run(t.Context(), s, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", s, err)
		}
	}
}
