package servertest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// StartPgBouncer puts a private PgBouncer in front of a PostgreSQL that StartPostgres has started. The mode is "session", "transaction" or
// "statement"; more are lines of its own configuration. The caller stops it before the server.
func StartPgBouncer(ctx context.Context, server *Server, mode string, more ...string) (*Server, error) {
	const install = "apt-get install pgbouncer, brew install pgbouncer, or your system's package of PgBouncer"
	program, err := lookPath(install, "pgbouncer", "/usr/sbin/pgbouncer") // Debian keeps it out of the PATH of users
	if err != nil {
		return nil, err
	}
	account, err := unprivileged("postgres")
	if err != nil {
		return nil, err
	}
	s, err := start(ctx, kind{
		name: "pgbouncer",
		prepare: func(folder string, port int) ([]string, error) {
			config, users := filepath.Join(folder, "pgbouncer.ini"), filepath.Join(folder, "users.txt")
			text := fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir = %s\n"+
				"auth_type = trust\nauth_file = %s\npool_mode = %s\n", server.port, port, folder, users, mode)
			for _, line := range more {
				text += line + "\n"
			}
			if err := os.WriteFile(users, []byte("\"postgres\" \"\"\n"), 0o644); err != nil {
				return nil, err
			}
			return []string{program, config}, os.WriteFile(config, []byte(text), 0o644)
		},
		ready:   readyAtSocket,
		account: account,
	})
	if err != nil {
		return nil, err
	}
	s.locate()
	return s, nil
}

// PgBouncer is StartPgBouncer for a test, as Redis is StartRedis. It counts as a part of PostgreSQL where that is required.
func PgBouncer(tb testing.TB, server *Server, mode string, more ...string) *Server {
	tb.Helper()
	return use(tb, "postgres", func(ctx context.Context) (*Server, error) { return StartPgBouncer(ctx, server, mode, more...) })
}
