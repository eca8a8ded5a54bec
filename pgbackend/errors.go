package pgbackend

import (
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// errWithdrawn is the answer to a request that was released or cleaned up before.
var errWithdrawn = errors.New("the request was withdrawn: ask again with a new ID")

// hints says what to do about errors of the server, by the beginning of their code
// (https://www.postgresql.org/docs/current/errcodes-appendix.html).
var hints = []struct{ code, hint string }{
	{"28", "the server refuses this user or password"},
	{"3D000", "the database does not exist: name another in the URL's path"},
	{"42501", "the server's user lacks a right that locks need (see the package's documentation)"},
	{"53300", "the server has no connection left: raise max_connections, or use fewer clients"},
	{"53200", "the server's lock table is full: raise max_locks_per_transaction"},
	{"57P03", "the server is starting up or shutting down: try again in a moment"},
	{"25006", "the server's transactions are read-only: connect to its primary"},
}

// explain puts in front of an error what to do about it, and takes out what nobody needs.
func explain(err error) error {
	// The connection's own error names user and database, and has one line for each address tried.
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) {
		err = &unreachable{connect}
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		for _, h := range hints {
			if strings.HasPrefix(pgErr.Code, h.code) {
				return fmt.Errorf("%s: %w", h.hint, err)
			}
		}
	}
	return err
}

// unreachable is a failed connection, in one line.
type unreachable struct{ err *pgconn.ConnectError }

func (u *unreachable) Error() string {
	return "cannot connect: " + strings.Join(strings.Fields(u.err.Unwrap().Error()), " ")
}

func (u *unreachable) Unwrap() error { return u.err }
