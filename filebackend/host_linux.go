package filebackend

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bootNow reads the clock that all processes of the host share: it counts suspend, and nobody can set it.
func bootNow() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // every Linux that Go runs on has it; see bootID
	return time.Duration(ts.Nano())
}

// bootIDFile is changed by tests, which cannot reboot the machine.
var bootIDFile = "/proc/sys/kernel/random/boot_id"

// bootID names the time since the host was started, and refuses to run on a clock that other processes do not share.
func bootID() (string, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", fmt.Errorf("this system has no boot clock: %w", err)
	}
	if offsets, err := os.ReadFile("/proc/self/timens_offsets"); err == nil { // not before Linux 5.6
		for line := range strings.Lines(string(offsets)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "boottime" && (f[1] != "0" || f[2] != "0") {
				return "", errors.New("this process is in a time namespace, whose clock differs from that of other processes on the host: run it outside")
			}
		}
	}
	text, err := os.ReadFile(bootIDFile)
	if err != nil {
		return "", fmt.Errorf("cannot tell one boot of this host from another: %w", err)
	}
	id := strings.TrimSpace(string(text))
	if id == "" || strings.ContainsAny(id, "/\x00") {
		return "", fmt.Errorf("%s does not name the boot of this host", bootIDFile)
	}
	return id, nil
}

// flock locks the file if nobody else has it locked.
func flock(f *os.File) (bool, error) { return flockHow(f, unix.LOCK_EX) }

func flockShared(f *os.File) (bool, error) { return flockHow(f, unix.LOCK_SH) }

func flockHow(f *os.File, how int) (bool, error) {
	for {
		switch err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		default:
			return false, fmt.Errorf("flock %s: %w", f.Name(), err)
		}
	}
}

func unflock(f *os.File) error { return unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// openFile opens a file of the folder. It follows no link and waits for no pipe: who else may write in the folder must
// not lead this process, which may be root's, to another file.
func openFile(path string, flags int, mode fs.FileMode) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, uint32(mode.Perm()))
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ELOOP):
			return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("it is a symbolic link, which locker has not made: remove it")}
		default:
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// ownedByOther tells whether a folder is another user's.
func ownedByOther(path string) (bool, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return int(stat.Uid) != os.Geteuid(), nil
}

// exchange makes two files change places, in one step.
func exchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}

// Of these file systems it is certain that no other host sees them.
var localTypes = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC}

// Names of file systems that several hosts may see, as in /proc/self/mountinfo.
var sharedTypes = []string{
	"9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.ceph-fuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs",
	"fuse.sshfs", "fuse.vmhgfs-fuse", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "prl_fs", "smb3", "smbfs",
	"vboxsf", "virtiofs",
}

// mountsFile is changed by tests, which have no file server.
var mountsFile = "/proc/self/mountinfo"

// checkLocal refuses file systems that other hosts may see: there flock(2) and the boot clock say nothing of them.
func checkLocal(path string) error {
	var system unix.Statfs_t
	if err := unix.Statfs(path, &system); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if slices.Contains(localTypes, int64(system.Type)) { //nolint:unconvert // its size differs between architectures
		return nil
	}
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	mounts, err := os.Open(mountsFile)
	if err != nil {
		return nil // then it cannot be told
	}
	defer mounts.Close()
	device := fmt.Sprintf("%d:%d", unix.Major(uint64(stat.Dev)), unix.Minor(uint64(stat.Dev))) //nolint:unconvert // as above
	for lines := bufio.NewScanner(mounts); lines.Scan(); {
		if kind := fileSystem(lines.Text(), device); slices.Contains(sharedTypes, kind) {
			return fmt.Errorf("%s is on a file system (%s) that other hosts may see, where locks of this kind exclude nobody: "+
				"name a folder on a local disk", path, kind)
		}
	}
	return nil
}

// fileSystem is the type of file system that a line of mountinfo tells of, if it is that of the device.
func fileSystem(line, device string) string {
	mount, kind, _ := strings.Cut(line, " - ")
	if f := strings.Fields(mount); len(f) < 3 || f[2] != device {
		return ""
	}
	kind, _, _ = strings.Cut(kind, " ")
	return kind
}
