package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// report says how a run has ended, and returns the exit code.
func report(out, errs io.Writer, name string, s settings, r *run, err error) int {
	v, broken := errors.AsType[*violation](err)
	switch {
	case err == nil:
		fmt.Fprintf(out, "%s: ok (seed %d): %s\n", name, s.Seed, r.summary())
		return exitOK
	case errors.Is(err, context.Canceled):
		return exitOK // the signal says it
	case !broken:
		fmt.Fprintf(errs, "torture: %s: %s\n", name, strings.TrimPrefix(err.Error(), "locker: "))
		return exitUnavailable
	}
	fmt.Fprintf(out, "%s: BROKEN (seed %d): %s\n    %s\n", name, s.Seed, v, r.summary())
	path := filepath.Join(s.Out, name+".jsonl")
	const before = time.Second
	events, err := readHistory(path, v.From-before, v.To+before)
	if err != nil {
		fmt.Fprintf(errs, "torture: %v\n", err)
		return exitViolation
	}
	excerpt(out, v, events)
	picture := filepath.Join(s.Out, name+".html")
	if err := os.WriteFile(picture, draw(v, r, events), 0o644); err != nil {
		fmt.Fprintf(errs, "torture: %v\n", err)
	}
	fmt.Fprintf(out, "    history: %s\n    picture: %s\n    again:   %s\n", path, picture, r.again())
	return exitViolation
}

// summary is what was seen.
func (r *run) summary() string {
	j := r.judge
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(r.faults)) {
		faults = append(faults, fmt.Sprint(r.faults[name], " ", name))
	}
	return fmt.Sprintf("%d locks, %d of them lost; %s; after %d heals everybody had a lock within %v; "+
		"guarded: %d writes, %d refused; unguarded: %d overwritten; %d overlaps by evictions; %v",
		j.locks, j.lost, strings.Join(faults, ", "), r.heals, r.worst.Round(time.Millisecond), j.writes, j.refused, j.overwritten, j.excused,
		now(r.epoch).Round(time.Second/10))
}

// again is the command that repeats a run.
func (r *run) again() string {
	what := "-backend " + r.target.name
	if len(r.target.members) == 0 && r.target.name == "url" {
		what = "-url URL"
	}
	if r.Broken != "" {
		what += " -broken " + r.Broken
	}
	return fmt.Sprintf("go run ./torture %s -time %v -seed %d -processes %d -keys %d -ttl %v", what, r.Time, r.Seed, r.Processes, r.Keys, r.TTL)
}

// tells is true for an event without which a violation cannot be understood: what the locks did that it is about, and what their workers
// and the servers suffered meanwhile.
func (v *violation) tells(e event) bool {
	of := func(same func(hold) bool) bool { return slices.ContainsFunc(v.Holds, same) }
	switch e.Kind {
	case kindAcquired, kindBelieved, kindReleased:
		return of(func(h hold) bool { return h == hold{e.Worker, e.Life, e.Lock} }) || v.Kind == "progress" && e.Key == v.Key
	case kindWrite:
		return (v.Kind == "guard" || v.Kind == "register") && e.Key == v.Key && v.From <= e.At && e.At <= v.To
	case kindFault, kindEnded:
		return v.From <= e.At && e.At <= v.To && (e.Worker == 0 || len(v.Holds) == 0 || of(func(h hold) bool { return h.worker == e.Worker }))
	case kindHeal, kindProgress, kindBye:
		return v.Kind == "progress" || v.Kind == "leak"
	}
	return false
}

// excerpt prints the events that tell what happened, the last of many.
func excerpt(out io.Writer, v *violation, events []event) {
	telling := slices.DeleteFunc(slices.Clone(events), func(e event) bool { return !v.tells(e) })
	slices.SortStableFunc(telling, func(a, b event) int { return cmp.Compare(a.At, b.At) })
	const most = 25
	if more := len(telling) - most; more > 0 {
		fmt.Fprintf(out, "    … %d more before\n", more)
		telling = telling[more:]
	}
	for _, e := range telling {
		fmt.Fprintf(out, "    %s\n", e)
	}
}

// String is the event on one line.
func (e event) String() string {
	who := fmt.Sprintf("worker %d", e.Worker)
	if e.Worker == 0 {
		who = "nemesis"
	}
	text := fmt.Sprintf("%-12s  %-9s %-8s", seconds(e.At), who, e.Kind)
	if e.Key != "" {
		text += fmt.Sprintf(" %s token %d", e.Key, e.Token)
	}
	switch e.Kind {
	case kindAcquired:
		text += fmt.Sprintf(", asked for at %s, trusted until %s", seconds(e.Call), seconds(e.Until))
	case kindBelieved:
		text += ", until then; trusted until " + seconds(e.Until)
	case kindWrite:
		text += fmt.Sprintf(", over version %d (guarded) and %d", e.Base.Guarded, e.Base.Plain)
		if e.Refused {
			text += ", refused by the guard"
		}
	}
	if e.Text != "" {
		text += " " + e.Text
	}
	return text
}
