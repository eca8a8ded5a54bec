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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/filebackend"
)

// tryFolder makes this test program a process that waits for the lock "shared" of that folder, holds it for a moment,
// and gives it back, ten times.
const tryFolder = "LOCKER_FILEBACKEND_TRY"

func init() { mains[tryFolder] = tryLock } //nolint:gochecknoinits // a test

func tryLock(folder string) error {
	unix.Umask(0o077) // the least friendly that there is
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	b, err := filebackend.New(ctx, folder)
	if err != nil {
		return err
	}
	defer b.Close()
	for i := range 10 {
		req := locker.Request{Key: "shared", ID: fmt.Sprintf("%d-%d", os.Getpid(), i), TTL: time.Minute}
		lease, err := b.Acquire(ctx, req)
		if err != nil {
			return err
		}
		if _, err := b.Extend(ctx, lease); err != nil {
			return err
		}
		if err := b.Release(ctx, lease); err != nil {
			return err
		}
	}
	return nil
}

// as makes a command of this test program that runs as another user of the group 54321.
func as(t *testing.T, uid uint32, variable, argument string) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can run programs as another user")
	}
	program := filepath.Join(readable(t), "program")
	text, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(program, text, 0o755) //nolint:gosec // others must run it
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), variable+"="+argument, "GOCOVERDIR=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: 54321}}
	return cmd
}

// readable is a folder to which other users find their way; that of t.TempDir may be closed to them.
func readable(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "locker-others-") //nolint:usetesting // see above
	if err == nil {
		err = os.Chmod(folder, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}

// TestUsersShareAFolder: users who may all write in a folder use its locks, whatever their umasks are.
func TestUsersShareAFolder(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(readable(t), "locks")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chown(folder, 50001, 54321), os.Chmod(folder, 0o2770)); err != nil {
		t.Skipf("a folder for a group needs root: %v", err)
	}
	first := as(t, 50001, tryFolder, folder) // makes all that is there
	if out, err := first.CombinedOutput(); err != nil {
		t.Fatalf("the first user: %v\n%s", err, out)
	}
	var all []*exec.Cmd
	said := make([]strings.Builder, 3)
	for i := range said {
		cmd := as(t, 50001+uint32(i), tryFolder, folder)
		cmd.Stderr = &said[i]
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, cmd)
	}
	for i, cmd := range all {
		if err := cmd.Wait(); err != nil {
			t.Errorf("user %d: %v\n%s", i, err, said[i].String())
		}
	}
	if err := os.Chmod(folder, 0o2750); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(folder, "tokens.lock")); err != nil {
		t.Fatal(err)
	}
	out, err := as(t, 50002, tryFolder, folder).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "give a folder in which this user may write") {
		t.Errorf("a user who may not write: %v\n%s", err, out)
	}
}

// TestPlantedFiles: links and pipes that others put into a folder in which they may write lead nobody astray, nor
// hold anybody up.
func TestPlantedFiles(t *testing.T) {
	t.Parallel()
	precious := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := func(path string) error { return os.Symlink(precious, path) }
	pipe := func(path string) error { return unix.Mkfifo(path, 0o666) }
	key := "job"
	for what, plant := range map[string]func(string) error{"link": link, "pipe": pipe} {
		for _, where := range []string{"state", "temp", "stripe", "tokens", "tokens.tmp", "tokens.lock", "swept"} {
			folder := t.TempDir()
			b := open(t, folder) // makes the folder of this boot
			state := filebackend.StateFile(b, key)
			path := map[string]string{
				"state": state, "temp": strings.TrimSuffix(state, ".json") + ".tmp", "stripe": filebackend.StripeFile(b, key),
				"swept": filepath.Join(filepath.Dir(state), "swept"),
			}[where]
			if path == "" {
				path = filepath.Join(folder, where)
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if err := plant(path); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() {
				fresh, err := filebackend.New(t.Context(), folder)
				if err != nil {
					done <- err
					return
				}
				defer fresh.Close()
				_, err = fresh.Acquire(t.Context(), request(key))
				done <- err
			}()
			select {
			case err := <-done:
				if where == "state" && err == nil {
					t.Errorf("a %s for the %s was taken for a free lock", what, where)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("a %s for the %s holds everybody up", what, where)
			}
			if text, err := os.ReadFile(precious); err != nil || string(text) != "precious" {
				t.Fatalf("through a %s for the %s this was written into another file: %q (%v)", what, where, text, err)
			}
		}
	}
	folder := t.TempDir()
	b := open(t, folder)
	boot := filepath.Dir(filebackend.StateFile(b, key))
	if err := os.RemoveAll(boot); err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	if err := os.Symlink(elsewhere, boot); err != nil {
		t.Fatal(err)
	}
	if _, err := filebackend.New(t.Context(), folder); err == nil || !strings.Contains(err.Error(), boot+" is not a folder") {
		t.Errorf("a link for the folder of this boot: %v", err)
	}
}

// TestPrivateFolder is made for its user alone, and not taken from another.
func TestPrivateFolder(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a", "b")
	if err := filebackend.MakePrivate(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder's mode is %v (%v)", info.Mode(), err)
	}
	if err := os.Chown(path, 50001, 54321); err != nil {
		t.Skipf("giving a folder to another user needs root: %v", err)
	}
	if err := filebackend.MakePrivate(path); err == nil || !strings.Contains(err.Error(), "belongs to another user") {
		t.Errorf("a folder of another user: %v", err)
	}
}

// TestSharedFileSystem: a folder that other hosts may see is refused, and nothing is made there.
func TestSharedFileSystem(t *testing.T) {
	folder := t.TempDir()
	filebackend.Mount(t, folder, "nfs4")
	for _, path := range []string{folder, filepath.Join(folder, "locks")} {
		_, err := filebackend.New(t.Context(), path)
		if err == nil || !strings.Contains(err.Error(), "(nfs4) that other hosts may see") {
			t.Errorf("New(%s) on NFS: %v", path, err)
		}
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("left there: %v (%v)", left, err)
	}
}

// TestNoWatches: a system that gives no file events is good enough, only that waiters look more often.
func TestNoWatches(t *testing.T) {
	t.Parallel()
	script := `echo 0 >/proc/sys/user/max_inotify_instances && exec "$0"`
	folder := lockFolder(t)
	cmd := exec.CommandContext(t.Context(), "unshare", "--user", "--map-root-user", "sh", "-c", script, os.Args[0])
	cmd.Env = append(os.Environ(), deafFolder+"="+folder)
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "unshare") || errors.Is(err, exec.ErrNotFound) || strings.Contains(string(out), "max_inotify_instances") {
		t.Skipf("this system gives no user its own limits: %v %s", err, out)
	}
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// deafFolder makes this test program one that waits without file events.
const deafFolder = "LOCKER_FILEBACKEND_DEAF"

func init() { mains[deafFolder] = deaf } //nolint:gochecknoinits // a test

func deaf(folder string) error {
	if fd, err := unix.InotifyInit1(0); err == nil {
		return fmt.Errorf("there are file events all the same (%d)", fd)
	}
	ctx := context.Background()
	holder, err := filebackend.New(ctx, folder)
	if err != nil {
		return err
	}
	waiter, err := filebackend.New(ctx, folder)
	if err != nil {
		return err
	}
	for i := range 5 {
		lease, err := holder.Acquire(ctx, locker.Request{Key: "job", ID: fmt.Sprint("h", i), TTL: time.Minute, Lost: func(locker.Reason) {}})
		if err != nil {
			return err
		}
		type grant struct {
			lease locker.Lease
			err   error
			at    time.Time
		}
		granted := make(chan grant, 1)
		go func() {
			l, err := waiter.Acquire(ctx, locker.Request{Key: "job", ID: fmt.Sprint("w", i), TTL: time.Minute})
			granted <- grant{l, err, time.Now()}
		}()
		for h := (locker.Holding{}); h.Waiters == 0; {
			if h, err = holder.Inspect(ctx, "job"); err != nil {
				return err
			}
		}
		released := time.Now()
		if err := holder.Release(ctx, lease); err != nil {
			return err
		}
		g := <-granted
		if took := g.at.Sub(released); g.err != nil || took > 500*time.Millisecond {
			return fmt.Errorf("granted %v after the release: %w", took, g.err)
		}
		if err := waiter.Release(ctx, g.lease); err != nil {
			return err
		}
	}
	return errors.Join(holder.Close(), waiter.Close())
}
