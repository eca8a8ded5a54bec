package pgbackend_test

import (
	"errors"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/pgbackend"
)

// TestInspect shows what administrators see, and what PostgreSQL does not know.
func TestInspect(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	l := open(t, rawURL+"&application_name=nightly+job+%C3%A9")
	look := open(t, rawURL)
	const ttl = 20 * time.Second
	if holding, err := look.Inspect(t.Context(), "k"); err != nil || holding.Token != 0 {
		t.Errorf("a free lock: %+v, %v", holding, err)
	}
	if _, ok, err := look.InspectSession(t.Context(), "k"); err != nil || ok {
		t.Errorf("the session of a free lock: %v, %v", ok, err)
	}
	began := time.Now()
	lease := acquire(t, l, lasting(request("k"), ttl))
	wait(t.Context(), look, lasting(request("k"), ttl))
	eventually(t, "the request waits at the server", func() bool { return waiters(t, l, "k") == 1 })
	holding, err := look.Inspect(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if holding.Key != "k" || holding.Token != lease.Token || holding.Waiters != 1 || holding.Remaining > ttl || holding.Remaining < ttl/2 {
		t.Errorf("a held lock: %+v", holding)
	}
	session, ok, err := look.InspectSession(t.Context(), "k")
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if session.TTL != ttl || session.Started.Before(began.Add(-time.Minute)) || session.Started.After(time.Now().Add(time.Second)) {
		t.Errorf("its session: %+v", session)
	}
	if !strings.Contains(session.Label, "nightly job") {
		t.Errorf("its session's label is %q", session.Label)
	}
	admin := direct(t, rawURL)
	if got := ask(t, admin, "SELECT application_name FROM pg_stat_activity WHERE pid = $1", session.PID); len(got) != 1 || got[0] != session.Label {
		t.Errorf("the process %d has the labels %q, want %q", session.PID, got, session.Label)
	}
}

// TestInspectManyOfOneSession tells the tokens of many locks on one session apart.
func TestInspectManyOfOneSession(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	l, look := open(t, rawURL), open(t, rawURL)
	tokens := map[string]uint64{}
	for _, key := range strings.Split(strings.Repeat("k,", 200), ",")[:200] {
		key += strings.Repeat("x", len(tokens))
		tokens[key] = acquire(t, l, request(key)).Token
	}
	for key, token := range tokens {
		if holding, err := look.Inspect(t.Context(), key); err != nil || holding.Token != token {
			t.Fatalf("a lock with token %d: %+v, %v", token, holding, err)
		}
	}
}

// TestBreakStuckHolder breaks the lock of a holder that does not listen: its session is ended.
func TestBreakStuckHolder(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	var stuck atomic.Bool
	l := tap(t, rawURL, func(_ *tapped, p []byte) ([]byte, error) {
		if stuck.Load() {
			return nil, nil
		}
		return p, nil
	})
	operator := open(t, rawURL)
	lease, told := evictable(t, l, "k", long)
	stuck.Store(true)
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token - 1}); !errors.Is(err, locker.ErrLost) {
		t.Errorf("break of an older grant: %v, want ErrLost", err)
	}
	began := time.Now()
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("break took %v", took)
	}
	release(t, operator, acquire(t, operator, try("k")))
	select { // it hears of it all the same: the session hears what the server says
	case <-told:
	case <-time.After(time.Second):
		t.Error("not told of the loss")
	}
	if err := operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}); !errors.Is(err, locker.ErrLost) {
		t.Errorf("break of a lock that is free: %v, want ErrLost", err)
	}
}

// TestBreakWithoutRight is refused by the server, in clear words and bounded time, where the holder is another user's and does not listen.
func TestBreakWithoutRight(t *testing.T) {
	t.Parallel()
	server := start(t)
	owner := open(t, server.URL)
	app := withRole(t, server.URL, "")
	if _, err := direct(t, server.URL).Exec(t.Context(), "GRANT USAGE, SELECT, UPDATE ON SEQUENCE public.locker_tokens TO app"); err != nil {
		t.Fatal(err)
	}
	operator := open(t, app)
	var stuck atomic.Bool
	holder := tap(t, server.URL, func(_ *tapped, p []byte) ([]byte, error) {
		if stuck.Load() {
			return nil, nil
		}
		return p, nil
	})
	lease := acquire(t, holder, request("k"))
	stuck.Store(true)
	mustSay(t, operator.Break(t.Context(), locker.Holding{Key: "k", Token: lease.Token}), "lacks a right")
	if _, err := owner.Acquire(t.Context(), try("k")); !errors.Is(err, locker.ErrHeld) {
		t.Errorf("after a break that was refused: %v, want ErrHeld", err)
	}
	if holding, err := operator.Inspect(t.Context(), "k"); err != nil || holding.Token != lease.Token || holding.Remaining != 0 {
		t.Errorf("another user's lock: %+v, %v; want its token, and no Remaining", holding, err)
	}
}

// TestDocument runs the SQL that docs/postgres.md shows.
func TestDocument(t *testing.T) {
	t.Parallel()
	server := start(t)
	admin := direct(t, server.URL)
	if _, err := admin.Exec(t.Context(), "CREATE ROLE app LOGIN"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../docs/postgres.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) != 4 {
		t.Fatalf("there are %d blocks of SQL, want 4", len(blocks))
	}
	sequence, number, holder, table := blocks[0][1], blocks[1][1], blocks[2][1], blocks[3][1]
	if _, err := admin.Exec(t.Context(), sequence); err != nil {
		t.Errorf("the sequence: %v", err)
	}
	l := open(t, server.URL+"&ddl=false&application_name=documented")
	if got := l.Capabilities().Fencing; got != locker.FencingCrash {
		t.Errorf("with the documented sequence tokens survive %v", got)
	}
	acquire(t, l, request("invoice/42"))
	id := ask(t, admin, "SELECT id::text FROM ("+strings.TrimSuffix(strings.TrimSpace(number), ";")+") AS _(id)")
	if want := strconv.FormatInt(pgbackend.LockID(pgbackend.DefaultPrefix, "invoice/42"), 10); len(id) != 1 || id[0] != want {
		t.Errorf("the number of a lock is %q, want %s", id, want)
	}
	found := ask(t, admin, "SELECT application_name FROM ("+strings.TrimSuffix(strings.TrimSpace(strings.ReplaceAll(holder, "the number", id[0])), ";")+") AS _")
	if len(found) != 1 || found[0] != "locker hold 60000ms documented" {
		t.Errorf("the lock is held by %q", found)
	}
	if _, err := admin.Exec(t.Context(), table); err != nil {
		t.Errorf("the guard's table: %v", err)
	}
	if strings.Trim(table, ";\n") != pgbackend.GuardTable {
		t.Errorf("the documented table is not GuardTable: %s", table)
	}
	if err := pgbackend.Guard(t.Context(), begin(t, admin), "k", 1); err != nil {
		t.Errorf("Guard with the documented table: %v", err)
	}
}

// TestInspectAfterHandover does not count as a waiter who has just been granted the lock, although its gate is open a moment later.
func TestInspectAfterHandover(t *testing.T) {
	t.Parallel()
	rawURL := shared(t)
	first := open(t, rawURL)
	var slow atomic.Bool
	second := tap(t, rawURL, func(c *tapped, p []byte) ([]byte, error) {
		if c.role == "wait" && slow.Load() {
			time.Sleep(10 * time.Millisecond) // the link's own time
		}
		return p, nil
	})
	lease := acquire(t, first, request("k"))
	waiting := waitAtServer(t, second, request("k"))
	slow.Store(true)
	release(t, first, lease)
	lease = granted(t, waiting)
	if holding, err := first.Inspect(t.Context(), "k"); err != nil || holding.Waiters != 0 || holding.Token != lease.Token {
		t.Errorf("after a handover: %+v, %v; want token %d and no waiters", holding, err, lease.Token)
	}
}
