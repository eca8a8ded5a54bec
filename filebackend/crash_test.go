//go:build linux

package filebackend_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fec20105/locker"
	"github.com/fec20105/locker/filebackend"
)

// busyFolder makes this test program a process that takes, extends and releases locks of that folder without a pause.
const busyFolder = "LOCKER_FILEBACKEND_BUSY"

func init() { mains[busyFolder] = beBusy } //nolint:gochecknoinits // a test

// busyKeys are the locks that busy processes fight for.
const busyKeys = 3

func beBusy(folder string) error {
	ctx := context.Background()
	b, err := filebackend.New(ctx, folder)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for i := range 2 * busyKeys {
		wg.Go(func() {
			for n := 0; ; n++ {
				// A long TTL for the short time of a test run, so that what a killed process held is seen to stay held.
				req := locker.Request{Key: fmt.Sprint(i % busyKeys), ID: fmt.Sprintf("%d-%d-%d", os.Getpid(), i, n), TTL: 30 * time.Millisecond}
				lease, err := b.Acquire(ctx, req)
				if err == nil {
					_, err = b.Extend(ctx, lease)
				}
				if err == nil {
					err = b.Release(ctx, lease)
				}
				if err != nil && !errors.Is(err, locker.ErrLost) {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(2)
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// TestKilledInTheMiddle kills processes that do nothing but change states, at random instants, and reads all states after
// each: they are whole, nobody who lives is disturbed, and tokens grow. It takes all processors, so it is not parallel.
func TestKilledInTheMiddle(t *testing.T) {
	kills := 500
	if testing.Short() {
		kills = 50
	}
	folder := t.TempDir()
	observer := open(t, folder)
	var last [busyKeys]uint64
	whole := func(kill int) {
		for key := range busyKeys {
			h, err := observer.Inspect(t.Context(), fmt.Sprint(key))
			if err != nil {
				t.Fatalf("kill %d: %v", kill, err)
			}
			if h.Token != 0 && h.Token < last[key] {
				t.Fatalf("kill %d: token %d after %d", kill, h.Token, last[key])
			}
			last[key] = max(last[key], h.Token)
		}
		for _, err := range observer.List(t.Context()) {
			if err != nil {
				t.Fatalf("kill %d: %v", kill, err)
			}
		}
	}
	cutShort := 0
	for kill := range kills {
		cmd := again(t.Context(), busyFolder, folder)
		var said strings.Builder
		cmd.Stderr = &said
		mailbox := filepath.Join(folder, "locker-boot-*", "m-*")
		before, _ := filepath.Glob(mailbox)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Until it has begun to work, and then up to some hundred steps more.
		eventually(t, "the process works", func() bool {
			now, _ := filepath.Glob(mailbox)
			return slices.ContainsFunc(now, func(m string) bool { return !slices.Contains(before, m) })
		})
		time.Sleep(rand.N(10 * time.Millisecond))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); said.Len() > 0 {
			t.Fatalf("kill %d: the process said: %s (%v)", kill, said.String(), err)
		}
		if temps, _ := filepath.Glob(filepath.Join(folder, "locker-boot-*", "*.tmp")); len(temps) > 0 {
			cutShort++
		}
		whole(kill)
	}
	t.Logf("after %d of %d kills there was a step that was cut short", cutShort, kills)
	if cutShort == 0 && kills >= 500 {
		t.Error("no kill came in the middle of a step: does this test still do its work?")
	}
	for key := range busyKeys {
		req := request(fmt.Sprint(key))
		req.NoWait = false
		lease := acquire(t, observer, req)
		if lease.Token <= last[key] {
			t.Errorf("key %d: token %d after %d", key, lease.Token, last[key])
		}
		if err := observer.Release(t.Context(), lease); err != nil {
			t.Error(err)
		}
	}
	filebackend.Sweep(observer)
	if left := files(t, folder); len(left) != 1 { // the observer's own mailbox
		t.Errorf("after a sweep there are still: %q", left)
	}
}

// TestFullDisk: without room nothing is granted, what is held stays held, and can be released.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("a small file system cannot be mounted (are you root?): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	folder := filepath.Join(disk, "locks")
	b, err := filebackend.New(t.Context(), folder)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	held := acquire(t, b, request("held"))
	if err := b.Release(t.Context(), acquire(t, b, request("another"))); err != nil { // its stripe has its counter now
		t.Fatal(err)
	}

	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	if _, err := b.Acquire(t.Context(), request("another")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Acquire on a full disk: %v, want ENOSPC", err)
	}
	if _, err := b.Extend(t.Context(), held); !errors.Is(err, unix.ENOSPC) || errors.Is(err, locker.ErrLost) {
		t.Errorf("Extend on a full disk: %v, want ENOSPC: an unknown outcome", err)
	}
	if h, err := b.Inspect(t.Context(), "held"); err != nil || h.Token != held.Token {
		t.Errorf("what was held on a full disk is now %+v (%v)", h, err)
	}
	if err := b.Release(t.Context(), held); err != nil {
		t.Errorf("Release on a full disk: %v", err)
	}
	if h, err := b.Inspect(t.Context(), "another"); err != nil || h.Token != 0 {
		t.Errorf("what could not be granted is %+v (%v)", h, err)
	}
	if left := files(t, folder); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	acquire(t, b, request("another"))
}
