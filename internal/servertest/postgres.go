package servertest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// PostgresOptions asks for more than a plain server. Any of them makes it a private one.
type PostgresOptions struct {
	Private bool     // even if LOCKER_TEST_POSTGRES is set: the test hurts the server
	Args    []string // more of the server's own configuration: "-c", "max_connections=3"
	HBA     string   // who may connect, instead of everybody: the lines of pg_hba.conf
}

// StartPostgres returns the server named by LOCKER_TEST_POSTGRES if that is set and the options are zero, else a private
// PostgreSQL. The caller stops it. Its superuser is postgres, without a password.
func StartPostgres(ctx context.Context, opts PostgresOptions) (*Server, error) {
	private := opts.Private || len(opts.Args) > 0 || opts.HBA != ""
	if given := os.Getenv("LOCKER_TEST_POSTGRES"); given != "" && !private {
		return givenPostgres(ctx, given)
	}
	initdb, err := lookPostgres("initdb")
	if err != nil {
		return nil, err
	}
	account, err := unprivileged("postgres")
	if err != nil {
		return nil, err
	}
	s, err := start(ctx, kind{
		name: "postgres",
		prepare: func(folder string, port int) ([]string, error) {
			data := filepath.Join(folder, "data")
			cmd := exec.CommandContext(ctx, initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
			cmd.Dir = folder
			out, err := cmd.CombinedOutput()
			if errors.Is(err, os.ErrPermission) {
				return nil, fmt.Errorf("initdb: %w (may the account postgres enter %s?)", err, folder)
			}
			if err != nil {
				return nil, fmt.Errorf("initdb: %w\n%s", err, out)
			}
			if opts.HBA != "" {
				if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(opts.HBA), 0o600); err != nil {
					return nil, err
				}
			}
			return append([]string{filepath.Join(filepath.Dir(initdb), "postgres")}, postgresArgs(folder, port, opts)...), nil
		},
		ready:   readyAtSocket,
		account: account,
		family:  true,
		polite:  syscall.SIGINT, // SIGTERM would wait for the clients
	})
	if err != nil {
		return nil, err
	}
	s.locate()
	return s, nil
}

// StartStandby starts a server that follows another, which StartPostgres has started. The caller stops it before that one.
func StartStandby(ctx context.Context, primary *Server) (*Server, error) {
	initdb, err := lookPostgres("initdb") // beside it is the same server as the primary's
	if err != nil {
		return nil, err
	}
	basebackup, err := lookPostgres("pg_basebackup")
	if err != nil {
		return nil, err
	}
	account, err := unprivileged("postgres")
	if err != nil {
		return nil, err
	}
	s, err := start(ctx, kind{
		name: "postgres",
		prepare: func(folder string, port int) ([]string, error) {
			cmd := exec.CommandContext(ctx, basebackup, "-D", filepath.Join(folder, "data"), "-R", "-c", "fast", "-N",
				"-h", "127.0.0.1", "-p", strconv.Itoa(primary.port), "-U", "postgres")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
			cmd.Dir = folder
			if out, err := cmd.CombinedOutput(); err != nil {
				return nil, fmt.Errorf("pg_basebackup: %w\n%s", err, out)
			}
			// The server wants its data for itself.
			if err := os.Chmod(filepath.Join(folder, "data"), 0o700); err != nil {
				return nil, err
			}
			return append([]string{filepath.Join(filepath.Dir(initdb), "postgres")}, postgresArgs(folder, port, PostgresOptions{})...), nil
		},
		ready:   readyAtSocket,
		account: account,
		family:  true,
		polite:  syscall.SIGINT,
	})
	if err != nil {
		return nil, err
	}
	s.locate()
	return s, nil
}

// locate notes where a server of PostgreSQL's protocol is.
func (s *Server) locate() {
	s.URL = "postgres://postgres@" + s.Addr + "/postgres?sslmode=disable"
	s.Socket = filepath.Join(s.guard.folder, ".s.PGSQL."+strconv.Itoa(s.port))
}

func postgresArgs(folder string, port int, opts PostgresOptions) []string {
	args := []string{
		"-D", filepath.Join(folder, "data"), "-k", folder, "-p", strconv.Itoa(port),
		"-c", "listen_addresses=127.0.0.1",
		"-c", "max_connections=500", // a test opens many clients
		"-c", "shared_buffers=32MB",
		// What is committed is handed to the kernel, so a killed server comes back with it. To wait for the disk as well
		// would only help against a crash of the whole machine.
		"-c", "fsync=off",
	}
	return append(args, opts.Args...)
}

// lookPostgres finds one of PostgreSQL's programs. Debian keeps those of the server out of PATH, in a folder for each version.
func lookPostgres(program string) (string, error) {
	const install = "apt-get install postgresql, brew install postgresql, or your system's package of PostgreSQL 14 or later"
	path, err := lookPath(install, program)
	if err == nil {
		return path, nil
	}
	found, globErr := filepath.Glob("/usr/lib/postgresql/*/bin/" + program)
	if globErr != nil || len(found) == 0 {
		return "", err
	}
	version := func(path string) int {
		n, _ := strconv.Atoi(strings.Split(path, "/")[4]) // one that is no number is the last choice
		return n
	}
	return slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }), nil
}

// unprivileged is the account for a server that refuses to be run by root; nil if this program is not.
func unprivileged(name string) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil //nolint:nilnil // as documented
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("servertest: this program is run by root, and PostgreSQL refuses that: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
	if err = errors.Join(err, gidErr); err != nil {
		return nil, fmt.Errorf("servertest: the account %s: %w", name, err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// readyAtSocket answers nil once somebody serves clients at the only socket in a server's folder.
func readyAtSocket(ctx context.Context, folder string) error {
	sockets, err := filepath.Glob(filepath.Join(folder, ".s.PGSQL.*[0-9]"))
	if err != nil || len(sockets) != 1 {
		return errors.Join(err, fmt.Errorf("it has %d sockets yet", len(sockets)))
	}
	return pingPostgres(ctx, "unix", sockets[0])
}

// pingPostgres logs in, for a process over the unix socket in the server's own folder: whoever answers there is the server that was
// started, and has its port open too, because it opens that before.
func pingPostgres(ctx context.Context, network, addr string) error {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	const protocol = 3 << 16
	hello := binary.BigEndian.AppendUint32(nil, protocol)
	hello = append(hello, "user\x00postgres\x00database\x00postgres\x00\x00"...)
	hello = append(binary.BigEndian.AppendUint32(nil, uint32(len(hello)+4)), hello...)
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	for {
		var head [5]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return err
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(conn, body); err != nil {
			return err
		}
		switch head[0] {
		case 'E':
			// It starts up, shuts down or recovers. Any other refusal is that of a server that works as it was told to.
			if bytes.Contains(body, []byte("C57P03\x00")) {
				return errors.New(string(bytes.ReplaceAll(body, []byte{0}, []byte(" "))))
			}
			return nil
		case 'Z':
			_, err := conn.Write([]byte{'X', 0, 0, 0, 4})
			return err
		}
	}
}

// givenPostgres finds out whether anybody is there, so that a wrong address fails at once and in clear words.
func givenPostgres(ctx context.Context, rawURL string) (*Server, error) {
	const name = "servertest: LOCKER_TEST_POSTGRES"
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return nil, errors.New(name + " is no URL of the form postgres://[user:password@]host:port/database")
	}
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "5432")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s names a server that cannot be reached: %w", name, err)
	}
	return &Server{URL: rawURL, Addr: addr, kind: kind{name: "postgres"}}, conn.Close()
}
