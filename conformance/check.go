package conformance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/fec20105/locker"
)

// row is one property of the contract.
type row struct {
	name   string // stable: people quote it
	clause string // of the contract: what must be true, printed when it is not
	needs  need   // what the harness must offer
	alone  bool   // keeps the processors busy: runs by itself, after those that bear company
	hurts  bool   // hurts the server: runs by itself, after all others
	long   bool   // takes several TTLs: begins before the others
	run    func(t *trial)
}

// need is a set of optional parts of a Harness.
type need uint

const (
	needExpire need = 1 << iota
	needPause
	needCrash
	needRestart
	needWipe
	needProcess
	needLeftovers
	needEndWait
	needCluster
	needLeader
	needMoveLeader
	needMajority
	needIsolate
)

// missing names what row r needs and h does not have.
func (h Harness) missing(needs need) []string {
	var names []string
	for _, part := range []struct {
		need   need
		name   string
		absent bool
	}{
		{needExpire, "Expire", h.Expire == nil},
		{needPause, "Server.Pause and Server.Resume", h.Server.Pause == nil || h.Server.Resume == nil},
		{needCrash, "Server.Crash", h.Server.Crash == nil},
		{needRestart, "Server.Restart", h.Server.Restart == nil},
		{needWipe, "Server.Wipe", h.Server.Wipe == nil},
		{needProcess, "Process", h.Process == nil},
		{needLeftovers, "Leftovers", h.Leftovers == nil},
		{needEndWait, "EndWait", h.EndWait == nil},
		{needCluster, "Cluster of three members that can be paused and killed", !h.Cluster.complete()},
		{needLeader, "Cluster.Leader", h.Cluster.Leader == nil},
		{needMoveLeader, "Cluster.MoveLeader", h.Cluster.MoveLeader == nil},
		{needMajority, "Cluster whose members grant locks only together", h.Cluster.Asynchronous},
		{needIsolate, "Cluster.Isolate and Cluster.Rejoin", h.Cluster.Isolate == nil || h.Cluster.Rejoin == nil},
	} {
		if needs&part.need != 0 && part.absent {
			names = append(names, part.name)
		}
	}
	return names
}

// Outcome of a row.
type Outcome uint8

// The outcomes, from good to bad.
const (
	Passed Outcome = iota
	Skipped
	Failed
)

// String is the outcome in lower case.
func (o Outcome) String() string {
	return [...]string{"passed", "skipped", "failed"}[o]
}

// Result tells how a row ended.
type Result struct {
	Row     string // its name
	Clause  string // of the contract
	Source  string // file and line of the row
	Outcome Outcome
	Seen    string // what failed, why it was skipped, what it logged
	Took    time.Duration
}

// String is the report that a reader of a failed test gets.
func (r Result) String() string {
	seen := strings.ReplaceAll(strings.TrimRight(r.Seen, "\n"), "\n", "\n\t")
	if r.Outcome != Failed {
		return fmt.Sprintf("%s %v: %s", r.Row, r.Outcome, seen)
	}
	return fmt.Sprintf("%s failed after %v\n\tclause: %s\n\trow:    %s\n\tseen:   %s",
		r.Row, r.Took.Round(time.Millisecond), r.Clause, r.Source, seen)
}

// Check runs every row and reports each result as it comes, one at a time. The error names the rows that failed, or
// says why the suite could not start.
func Check(ctx context.Context, h Harness, report func(Result)) error {
	s, err := newSuite(ctx, h)
	if err != nil {
		return err
	}
	var failed []string
	rows := allRows()
	s.runRows(ctx, rows, func(r Result) {
		if r.Outcome == Failed {
			failed = append(failed, r.Row)
		}
		report(r)
	})
	if len(failed) > 0 {
		return fmt.Errorf("conformance: %d of %d rows failed: %s", len(failed), len(rows), strings.Join(failed, ", "))
	}
	return ctx.Err()
}

// atOnce is how many rows run at the same time unless the harness says otherwise: they spend their time in waiting, not
// in working.
const atOnce = 16

// schedule calls run for each row, and returns when all are done.
func schedule(rows []row, atOnce int, run func(row)) {
	work(rows, atOnce, run)
	hurt(rows, run)
}

// work runs the rows that hurt no server: first those that bear company, so many at a time, then the others.
func work(rows []row, atOnce int, run func(row)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for _, long := range []bool{true, false} {
		for _, r := range rows {
			if !r.alone && !r.hurts && r.long == long {
				slots <- struct{}{}
				wg.Go(func() {
					defer func() { <-slots }()
					run(r)
				})
			}
		}
	}
	wg.Wait()
	for _, r := range rows {
		if r.alone {
			run(r)
		}
	}
}

// hurt runs those that hurt the server, and wait most of the time for what comes of it.
func hurt(rows []row, run func(row)) {
	for _, r := range rows {
		if r.hurts {
			run(r)
		}
	}
}

// suite is a harness and what was measured of it.
type suite struct {
	Harness
	caps  locker.Capabilities
	rtt   time.Duration // one call on an idle link
	slack time.Duration // how late the scheduler of this machine may be
}

// slack is how late the scheduler of this machine may be.
func slack() time.Duration {
	if os.Getenv("CI") == "true" {
		return 500 * time.Millisecond
	}
	return 100 * time.Millisecond
}

// newSuite opens one Locker, asks for its promises and measures its round trip.
func newSuite(ctx context.Context, h Harness) (_ *suite, err error) {
	if h.Open == nil {
		return nil, errors.New("conformance: the harness has no Open: it is required")
	}
	if h.TTL <= 0 {
		h.TTL = 2 * time.Second
	}
	if h.AtOnce <= 0 {
		h.AtOnce = atOnce
	}
	s := &suite{Harness: h, slack: slack()}
	ctx, cancel := context.WithTimeout(ctx, s.watchdog())
	defer cancel()
	net := NewNetwork()
	defer func() { err = errors.Join(err, net.Close()) }()
	l, err := h.Open(ctx, net)
	if err != nil {
		return nil, fmt.Errorf("conformance: the harness cannot open a Locker: %w", err)
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	s.caps = l.Capabilities()
	for range 5 {
		began := time.Now()
		lease, err := l.Acquire(ctx, locker.Request{Key: "conformance/" + rand.Text(), ID: rand.Text(), TTL: h.TTL, NoWait: true})
		took := time.Since(began)
		if err == nil {
			err = l.Release(ctx, lease)
		}
		if err != nil {
			return nil, fmt.Errorf("conformance: a first acquire and release of a free key: %w", err)
		}
		if s.rtt == 0 || took < s.rtt {
			s.rtt = took
		}
	}
	return s, nil
}

// watchdog is the time after which a row hangs.
func (s *suite) watchdog() time.Duration {
	return 15*s.TTL + 200*s.slack
}

// runRows runs the rows and reports each result, one at a time.
func (s *suite) runRows(ctx context.Context, rows []row, report func(Result)) {
	var mu sync.Mutex
	schedule(rows, s.AtOnce, func(r row) {
		result := s.run(ctx, r)
		mu.Lock()
		defer mu.Unlock()
		report(result)
	})
}

// run runs one row, under a watchdog, and then looks for what it left behind.
func (s *suite) run(ctx context.Context, r row) Result {
	began := time.Now()
	t := &trial{suite: s, row: r, id: strings.ToLower(rand.Text()[:10])}
	if missing := s.missing(r.needs); len(missing) > 0 {
		t.record(Skipped, "the harness has no %s", strings.Join(missing, ", no "))
		return t.result(began)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t.ctx = pprof.WithLabels(ctx, pprof.Labels(labelKey, t.id))
	done := make(chan struct{})
	go func() {
		// The profiler knows the label of every goroutine that descends from this one: a row's leak and a row's
		// hang are told apart from those of its neighbours by it.
		pprof.SetGoroutineLabels(t.ctx)
		defer close(done)
		defer t.clean(cancel)
		defer t.recovered()
		r.run(t)
	}()
	if !t.wait(done, s.watchdog()) {
		t.Errorf("watchdog: still running after %v\n%s", s.watchdog(), goroutinesOf(t.id))
		t.heal()
		cancel(errWatchdog)
		if !t.wait(done, 100*s.slack) {
			t.Errorf("watchdog: did not end when its context did; abandoned\n%s", goroutinesOf(t.id))
			return t.result(began)
		}
	}
	if left := leaked(t.id, 20*s.slack); left != "" {
		t.Errorf("goroutines are left:\n%s", left)
	}
	return t.result(began)
}

var errWatchdog = errors.New("conformance: the row hangs")

// wait is true if done was closed within d.
func (t *trial) wait(done <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	}
	select { // both may be ready
	case <-done:
		return true
	default:
		return false
	}
}

// recovered turns a panic of a row into a failure.
func (t *trial) recovered() {
	if p := recover(); p != nil {
		t.Errorf("panic: %v\n%s", p, debug.Stack())
	}
}

// result is what the trial has seen so far.
func (t *trial) result(began time.Time) Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Result{
		Row: t.row.name, Clause: t.row.clause, Source: source(t.row),
		Outcome: t.outcome, Seen: t.seen.String(), Took: time.Since(began),
	}
}

// source is the file and line of a row's function.
func source(r row) string {
	entry := reflect.ValueOf(r.run).Pointer()
	file, line := runtime.FuncForPC(entry).FileLine(entry)
	return fmt.Sprintf("%s:%d", filepath.Base(file), line)
}
