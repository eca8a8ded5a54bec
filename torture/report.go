package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
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
	case !broken:
		fmt.Fprintf(errs, "torture: %s: %s\n", name, strings.TrimPrefix(err.Error(), "locker: "))
		return exitUnavailable
	}
	fmt.Fprintf(out, "%s: BROKEN (seed %d): %s\n    %s\n", name, s.Seed, v, r.summary())
	path := filepath.Join(s.Out, name+".jsonl")
	const round = time.Second
	events, err := readHistory(path, v.From-round, v.To+round)
	if err != nil {
		fmt.Fprintf(errs, "torture: %v\n", err)
		return exitViolation
	}
	slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.At, b.At) })
	telling := slices.DeleteFunc(slices.Clone(events), func(e event) bool { return !v.tells(e) })
	const most = 25
	if more := len(telling) - most; more > 0 {
		fmt.Fprintf(out, "    … %d more before\n", more)
		telling = telling[more:]
	}
	for _, e := range telling {
		fmt.Fprintf(out, "    %s\n", e)
	}
	picture := filepath.Join(s.Out, name+".html")
	if err := draw(picture, v, r, events, telling); err != nil {
		fmt.Fprintf(errs, "torture: %v\n", err)
	}
	fmt.Fprintf(out, "    history: %s\n    picture: %s\n    again:   %s\n", path, picture, r.again())
	return exitViolation
}

// summary is what was seen.
func (r *run) summary() string {
	j := r.judge
	var faults []string
	for _, fault := range slices.Sorted(maps.Keys(r.faults)) {
		faults = append(faults, fmt.Sprint(fault, " ", r.faults[fault]))
	}
	return fmt.Sprintf("%d locks, %d of them lost; faults: %s; after each of %d heals everybody had a lock within %v; "+
		"%d guarded writes, %d refused; %d unguarded ones overwrote others; %d overlaps by evictions; %v",
		j.locks, j.lost, cmp.Or(strings.Join(faults, ", "), "none"), r.heals, r.slowest.Round(time.Millisecond),
		j.writes, j.refused, j.overwritten, j.excused, now(r.epoch).Round(time.Second/10))
}

// again is the command that repeats a run.
func (r *run) again() string {
	what := "-backend " + r.target.name
	if r.target.given {
		what = "-url URL"
	}
	if r.Broken != "" {
		what += " -broken " + r.Broken
	}
	return fmt.Sprintf("go run ./torture %s -time %v -seed %d -processes %d -keys %d -ttl %v", what, r.Time, r.Seed, r.Processes, r.Keys, r.TTL)
}

// tells is true for an event without which a violation cannot be understood: what the locks did that it is about, and what their
// workers and the servers suffered meanwhile.
func (v *violation) tells(e event) bool {
	meanwhile := v.From <= e.At && e.At <= v.To
	of := func(same func(hold) bool) bool { return slices.ContainsFunc(v.Holds, same) }
	switch e.Kind {
	case kindAcquired, kindBelieved, kindReleased:
		return of(func(h hold) bool { return h == hold{e.Worker, e.Life, e.Lock} }) || v.Kind == "progress" && e.Key == v.Key
	case kindWrite:
		return meanwhile && e.Key == v.Key && (v.Kind == "guard" || v.Kind == "register")
	case kindFault, kindEnded:
		return meanwhile && (e.Worker == 0 || len(v.Holds) == 0 || of(func(h hold) bool { return h.worker == e.Worker }))
	case kindHeal, kindProgress, kindBye:
		return v.Kind == "progress" || v.Kind == "leak"
	}
	return false
}
