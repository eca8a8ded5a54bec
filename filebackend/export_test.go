//go:build linux

package filebackend

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Reboot makes folders that are opened from now on believe that the host was started again.
func Reboot(t *testing.T) {
	old := bootIDFile
	bootIDFile = filepath.Join(t.TempDir(), "boot_id")
	t.Cleanup(func() { bootIDFile = old })
	if err := os.WriteFile(bootIDFile, []byte("00000000-0000-4000-8000-000000000000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Deafen takes the file events from a Backend, as a system does that has none left.
func Deafen(t *testing.T, b *Backend) {
	if err := b.mail.open(); err != nil {
		t.Fatal(err)
	}
	b.mail.listen()
	b.mail.mu.Lock()
	defer b.mail.mu.Unlock()
	if err := b.mail.watcher.Remove(b.mail.file.Name()); err != nil {
		t.Fatal(err)
	}
}

// Sweep sweeps now.
func Sweep(b *Backend) { b.sweep() }

// StateFile is the path of a key's state.
func StateFile(b *Backend, key string) string { return b.folder.stateFile(key) }

// StripeFile is the path of the lock file under which a key's steps are made.
func StripeFile(b *Backend, key string) string { return b.folder.stripeOf(hashOf(key)).path }

// MakePrivate makes a folder like the user's own.
var MakePrivate = makePrivate

// Mount makes folders that are opened from now on believe that the file system of path is of that type.
func Mount(t *testing.T, path, kind string) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	oldFile, oldTypes := mountsFile, localTypes
	t.Cleanup(func() { mountsFile, localTypes = oldFile, oldTypes })
	mountsFile, localTypes = filepath.Join(t.TempDir(), "mountinfo"), nil
	line := fmt.Sprintf("41 23 %d:%d / /mnt rw,relatime shared:7 - %s server:/data rw\n", unix.Major(stat.Dev), unix.Minor(stat.Dev), kind)
	if err := os.WriteFile(mountsFile, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
}

// MailboxOf is the path of the mailbox of a request that waits.
func MailboxOf(b *Backend, key, id string) string {
	s, err := b.folder.read(key)
	if err != nil {
		return ""
	}
	for _, e := range s.Queue {
		if e.ID == id {
			return filepath.Join(b.folder.boot, e.Mailbox)
		}
	}
	return ""
}

// FileSystem and IsShared show how mounts are judged.
var FileSystem = fileSystem

// Shared are the file systems that are refused.
var Shared = sharedTypes
