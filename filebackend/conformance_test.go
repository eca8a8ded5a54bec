//go:build linux

package filebackend_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/conformance"
	"github.com/fec20105/locker/filebackend"
)

// serveFolder makes this test program a process that conformance starts: it serves Lockers on that folder.
const serveFolder = "LOCKER_FILEBACKEND_SERVE"

// mains are the other things that this test program does in processes of its own, by the variable that asks for them.
var mains = map[string]func(argument string) error{
	serveFolder: func(folder string) error { return conformance.Serve(context.Background(), opener(folder)) },
}

func TestMain(m *testing.M) {
	for variable, run := range mains {
		if argument := os.Getenv(variable); argument != "" {
			if err := run(argument); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// again makes a command that runs this test program as one of mains.
func again(ctx context.Context, variable, argument string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), variable+"="+argument)
	return cmd
}

func opener(folder string) func(context.Context, *conformance.Network) (locker.Locker, error) {
	return func(ctx context.Context, net *conformance.Network) (locker.Locker, error) {
		b, err := filebackend.New(ctx, folder)
		if err != nil {
			return nil, err
		}
		return net.Wrap(b), nil
	}
}

// TestConformance has no Server.Crash: what crashes here is the host, which ends all clients too (see TestReboot), or a
// client in the middle of a step (see TestKilledInTheMiddle).
func TestConformance(t *testing.T) {
	t.Parallel()
	folder := lockFolder(t)
	operator := open(t, folder)
	conformance.Run(t, conformance.Harness{
		TTL:  time.Second,
		Open: opener(folder),
		Expire: func(ctx context.Context, lease locker.Lease) error {
			return operator.Break(ctx, locker.Holding{Key: lease.Key, Token: lease.Token})
		},
		EndWait: func(_ context.Context, waiting locker.Request) error {
			return os.Remove(filebackend.MailboxOf(operator, waiting.Key, waiting.ID))
		},
		Process: func(ctx context.Context) *exec.Cmd { return again(ctx, serveFolder, folder) },
		Server:  frozenFolder(t, folder),
		Leftovers: func(context.Context) (all, immortal []string, err error) {
			files, err := filepath.Glob(filepath.Join(folder, "locker-boot-*", "*"))
			for _, path := range files {
				switch file := filepath.Base(path); {
				case strings.HasSuffix(file, ".lock"), file == "swept", strings.HasPrefix(file, "m-"):
					// As many as there are, and one for each process that lives.
				case strings.HasSuffix(file, ".json"):
					all = append(all, file)
				default:
					immortal = append(immortal, file)
				}
			}
			return append(all, immortal...), immortal, err
		},
		Artifacts: t.TempDir(),
	})
}

// frozenFolder is a server in so far as a process that stands still in the middle of a step stops all others.
func frozenFolder(t *testing.T, folder string) conformance.Server {
	var taken []*os.File
	resume := func(context.Context) (err error) {
		for _, file := range taken {
			err = errors.Join(err, file.Close())
		}
		taken = nil
		return err
	}
	t.Cleanup(func() { _ = resume(t.Context()) })
	return conformance.Server{
		Pause: func(context.Context) error {
			files, err := filepath.Glob(filepath.Join(folder, "locker-boot-*", "*.lock"))
			for _, path := range files {
				file, err := os.Open(path)
				if err == nil {
					err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
				}
				if err != nil {
					return err
				}
				taken = append(taken, file)
			}
			return err
		},
		Resume: resume,
		Wipe:   func(context.Context) error { return os.RemoveAll(folder) },
	}
}

func open(t *testing.T, folder string) *filebackend.Backend {
	t.Helper()
	b, err := filebackend.New(t.Context(), folder)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return b
}

// lockFolder is a folder for locks in memory, where the system has that: on a disk every step waits for the journal, which
// other programs keep busy for up to a second, and the tests would measure those.
func lockFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("/dev/shm", "locker-test-") //nolint:usetesting // that one may be on a disk
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}
