package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// tokens says where tokens come from.
type tokens struct {
	sequence     string // quoted, to stand in SQL
	jumps        int64  // the advisory lock under which the sequence jumps
	transactions bool   // from transactions: there is no sequence
}

// jump is by how much the sequence goes on where nobody can tell what a crash has made it forget: more values than are drawn
// in the moment before the server has written them.
const jump = 100_000

// prepareTokens finds the sequence, creates it, or does without.
func (b *Backend) prepareTokens(ctx context.Context) error {
	quoted, err := quoteName(b.opts.Sequence)
	if err != nil {
		return err
	}
	t := tokens{sequence: "'" + strings.ReplaceAll(quoted, "'", "''") + "'::regclass"}
	for range 3 {
		st, err := b.askControl(ctx, fmt.Sprintf("SELECT r::oid, has_sequence_privilege(r, 'USAGE') AND has_sequence_privilege(r, 'SELECT') AND "+
			"has_sequence_privilege(r, 'UPDATE') FROM to_regclass(%s) r WHERE r IS NOT NULL", quoteText(quoted)))
		if err != nil {
			return err
		}
		if len(st.rows) == 1 {
			if st.rows[0][1] != "t" {
				return fmt.Errorf("the server's user may not use the sequence of the tokens: GRANT USAGE, SELECT, UPDATE ON SEQUENCE %s TO %s", quoted, b.config.User)
			}
			t.jumps = LockID("tokens", st.rows[0][0])
			b.tokens.Store(&t)
			return nil
		}
		if b.opts.WithoutDDL {
			break
		}
		_, err = b.askControl(ctx, "CREATE SEQUENCE IF NOT EXISTS "+quoted+" MAXVALUE 9007199254740991")
		switch code := codeOf(err); {
		case code == "42501": // no right
			b.opts.Logger.InfoContext(ctx, "the sequence of the tokens cannot be created: each lock costs the server a write instead", "sequence", b.opts.Sequence)
			t.transactions = true
			b.tokens.Store(&t)
			return nil
		case code == "23505": // somebody else creates it at this moment
		case err != nil:
			return err
		}
	}
	t.transactions = true
	b.tokens.Store(&t)
	return nil
}

func codeOf(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// holderStatements make a session ready to hold locks.
//
// A session that finds nobody else's shared lock on jumps is the first since the server started, because a crash ends all
// sessions: so it jumps. The jump is on disk before its transaction lets the lock go, and only then do others get their
// shared one.
func (t tokens) holderStatements() []string {
	token, mark := "0::int8", "NULL"
	var statements []string
	if !t.transactions {
		statements = []string{
			fmt.Sprintf("SELECT CASE WHEN pg_try_advisory_xact_lock(%d) THEN setval(%s, greatest(nextval(%[2]s) + %d, "+
				"(extract(epoch FROM clock_timestamp()) * 1000000)::int8)) END", t.jumps, t.sequence, jump),
			fmt.Sprintf("SELECT pg_advisory_lock_shared(%d)", t.jumps),
			"SET synchronous_commit = off", // what a crash forgets of the values drawn from now on, the next jump covers
		}
		token = fmt.Sprintf("nextval(%s)", t.sequence)
		mark = "CASE WHEN t IS NOT NULL THEN pg_try_advisory_lock_shared($3 | (t >> 32 & 255)::int4, ((t << 32) >> 32)::int4) END"
	}
	// The token is drawn after the grant, in the same statement. Nested CASEs, because AND promises no order; OFFSET 0, so
	// that the planner does not call the functions twice.
	const gate = "pg_try_advisory_xact_lock_shared($2)"
	grant := "CASE WHEN pg_try_advisory_lock($1) THEN " + token + " END"
	for _, s := range []struct{ name, grant string }{
		{"locker_ask", "CASE WHEN " + gate + " THEN " + grant + " END"}, // fails where somebody waits
		{"locker_take", grant}, // for whom holds the gate
	} {
		statements = append(statements, "PREPARE "+s.name+"(int8, int8, int4) AS SELECT t, "+mark+" FROM (SELECT "+s.grant+" AS t OFFSET 0) AS grant_")
	}
	if !t.transactions {
		const here = "CASE WHEN pg_backend_pid() = $4 THEN " // where the lock is
		statements = append(statements, "PREPARE locker_pass(int4, int4, int4, int4) AS SELECT t, "+strings.Replace(mark, "$3", "$1", 1)+", "+
			here+"pg_advisory_unlock_shared($2, $3) END FROM (SELECT "+here+token+" END AS t OFFSET 0) AS grant_")
	}
	return append(statements,
		"PREPARE locker_free(int8, int4, int4) AS SELECT pg_advisory_unlock($1), pg_advisory_unlock_shared($2, $3)",
		"PREPARE locker_pulse AS SELECT pg_backend_pid()",
		"LISTEN "+breakChannel,
	)
}

// drawToken is the statement for a token without a sequence. The transaction writes, so that the server cannot forget
// its number; should a sequence have come up meanwhile, others take tokens from there that this one would be no match for.
func (t tokens) drawToken() string {
	return "SELECT CASE WHEN to_regclass(" + strings.TrimSuffix(t.sequence, "::regclass") + ") IS NULL THEN pg_current_xact_id()::text END " +
		"FROM pg_logical_emit_message(true, 'locker', '')"
}

// newest is an expression for the newest token of all.
func (t tokens) newest() string {
	if t.transactions {
		return "pg_snapshot_xmax(pg_current_snapshot())::text"
	}
	return "pg_sequence_last_value(" + t.sequence + ")::text"
}

// drawn reads a token.
func drawn(st *statement) (uint64, error) {
	if len(st.rows) != 1 || st.rows[0][0] == "" {
		return 0, errors.New("a sequence for tokens has been created since this backend was opened: open it again")
	}
	return strconv.ParseUint(st.rows[0][0], 10, 64)
}

// quoteName quotes the name of a sequence, which may have a schema in front.
func quoteName(name string) (string, error) {
	parts := strings.Split(name, ".")
	for i, part := range parts {
		if part == "" || len(part) > 63 || len(parts) > 2 || strings.ContainsRune(part, 0) {
			return "", fmt.Errorf("the sequence's name %q is none: write schema.name, such as %q", name, DefaultSequence)
		}
		parts[i] = `"` + strings.ReplaceAll(part, `"`, `""`) + `"`
	}
	return strings.Join(parts, "."), nil
}

func quoteText(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
