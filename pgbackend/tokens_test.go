package pgbackend_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/pgbackend"
)

// TestTokensSurviveUnwrittenLog kills a server which has not written what was logged last: its writer sleeps, and transactions do not wait
// for it, as the settings of the database say. The crash forgets values that were drawn, and must not repeat one.
func TestTokensSurviveUnwrittenLog(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, more string }{{"sequence", ""}, {"transactions", "&ddl=false"}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			server := start(t, "-c", "wal_writer_delay=10s", "-c", "wal_writer_flush_after=1GB", "-c", "wal_buffers=16MB", "-c", "synchronous_commit=off")
			var last uint64
			for round := range 3 {
				l := open(t, server.URL+c.more)
				release(t, l, acquire(t, l, request("k"))) // what makes a session ready is written
				other := direct(t, server.URL)
				if _, err := other.Exec(t.Context(), "CREATE TABLE IF NOT EXISTS unwritten (n int); INSERT INTO unwritten SELECT generate_series(1, 1000)"); err != nil {
					t.Fatal(err)
				}
				for range 100 { // a sequence logs every 32nd value
					lease := acquire(t, l, request("k"))
					if lease.Token <= last {
						t.Fatalf("round %d: token %d follows %d", round, lease.Token, last)
					}
					last = lease.Token
					release(t, l, lease)
				}
				if err := server.Crash(t.Context()); err != nil {
					t.Fatal(err)
				}
				_ = l.Close()
			}
		})
	}
}

// TestUnwrittenLogIsForgotten shows that the crash of the test above is one that forgets.
func TestUnwrittenLogIsForgotten(t *testing.T) {
	t.Parallel()
	server := start(t, "-c", "wal_writer_delay=10s", "-c", "wal_writer_flush_after=1GB", "-c", "wal_buffers=16MB", "-c", "synchronous_commit=off")
	conn := direct(t, server.URL)
	for _, sql := range []string{"SET synchronous_commit = on", "CREATE SEQUENCE s", "SET synchronous_commit = off"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	before := ask(t, conn, "SELECT max(nextval('s'))::text FROM generate_series(1, 100)")
	if err := server.Crash(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := ask(t, direct(t, server.URL), "SELECT nextval('s')::text")
	if number(t, after[0]) > number(t, before[0]) {
		t.Errorf("a bare sequence went on from %s with %s: nothing was forgotten", before[0], after[0])
	}
}

func number(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSequence is about where tokens come from: a sequence that is created, one that an administrator has created, and none.
func TestSequence(t *testing.T) {
	t.Parallel()
	server := start(t)
	admin := direct(t, server.URL)
	app := withRole(t, server.URL, "")
	sequences := func() []string {
		return ask(t, admin, "SELECT schemaname || '.' || sequencename FROM pg_sequences ORDER BY 1")
	}

	without := open(t, app) // the role may not create one
	if got := sequences(); len(got) > 0 {
		t.Fatalf("there are sequences: %q", got)
	}
	if got := without.Capabilities().Fencing; got != locker.FencingRestart {
		t.Errorf("without a sequence tokens survive %v", got)
	}
	lease := acquire(t, without, request("k"))
	if again := acquire(t, without, request("other")); again.Token <= lease.Token {
		t.Errorf("token %d follows %d", again.Token, lease.Token)
	}

	forbidden := open(t, server.URL+"&ddl=false")
	if got := sequences(); len(got) > 0 {
		t.Fatalf("WithoutDDL has created %q", got)
	}
	release(t, without, lease)
	release(t, forbidden, acquire(t, forbidden, request("k")))

	if _, err := admin.Exec(t.Context(), `CREATE SCHEMA "my ""locks"`); err != nil {
		t.Fatal(err)
	}
	config := settings(t, server.URL)
	named, err := pgbackend.New(t.Context(), config, pgbackend.Options{Sequence: `my "locks.It's`})
	if err != nil {
		t.Fatal(err)
	}
	defer named.Close()
	if got, want := sequences(), `my "locks.It's`; len(got) != 1 || got[0] != want {
		t.Errorf("there are the sequences %q, want %s", got, want)
	}
	first := acquire(t, named, request("k"))
	release(t, named, first)
	if second := acquire(t, named, request("k")); second.Token != first.Token+1 {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}

	// The lines for administrators, as the documentation has them.
	if _, err := admin.Exec(t.Context(), "CREATE SEQUENCE public.locker_tokens MAXVALUE 9007199254740991; "+
		"GRANT USAGE, SELECT, UPDATE ON SEQUENCE public.locker_tokens TO app"); err != nil {
		t.Fatal(err)
	}
	with := open(t, app+"&ddl=false")
	if got := with.Capabilities().Fencing; got != locker.FencingCrash {
		t.Errorf("with a sequence tokens survive %v", got)
	}
	lease = acquire(t, with, request("k2"))
	// Tokens of those that were opened before would be no match for these: they notice.
	_, err = without.Acquire(t.Context(), request("k3"))
	mustSay(t, err, "open it again")
	release(t, with, acquire(t, with, request("k3"))) // what was undone may be under way still
	release(t, with, lease)
}

// TestSequenceIsDropped goes on without a word when an administrator takes the sequence away while nobody uses it.
func TestSequenceIsDropped(t *testing.T) {
	t.Parallel()
	server := start(t)
	l := open(t, server.URL)
	admin := direct(t, server.URL)
	lease := acquire(t, l, request("k"))
	if _, err := admin.Exec(t.Context(), "DROP SEQUENCE public.locker_tokens"); err != nil {
		t.Fatal(err)
	}
	_, err := l.Acquire(t.Context(), request("other"))
	mustSay(t, err, "does not exist")
	release(t, l, lease)
	next := acquire(t, l, lasting(request("k"), 2*long)) // on a new session
	if next.Token <= lease.Token {
		t.Errorf("token %d follows %d", next.Token, lease.Token)
	}
	release(t, l, next)
}

// TestTokensSurviveFailover promotes a standby. What it has not heard of is covered by its clock.
func TestTokensSurviveFailover(t *testing.T) {
	t.Parallel()
	primary := start(t)
	l := open(t, primary.URL)
	standby := standbyOf(t, primary)
	lease, told := evictable(t, l, "k", long)
	for range 100 {
		lease = acquire(t, l, request("k"+strconv.Itoa(int(lease.Token))))
	}
	if err := primary.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustBeTold(t, told, locker.ReasonDisconnected, time.Second)
	ask(t, direct(t, standby.URL), "SELECT pg_promote()::text")
	next := open(t, standby.URL)
	if got := acquire(t, next, request("k")); got.Token <= lease.Token {
		t.Errorf("token %d follows %d", got.Token, lease.Token)
	}
}
