package filebackend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"time"
)

// folder is where the locks are: for each boot of the host a folder in it.
type folder struct {
	path    string
	boot    string // the folder of this boot
	stripes [stripes]*lockFile
	reserve *lockFile // for the counter of tokens
	closed  chan struct{}
	share   fs.FileMode // see shareOf
}

// stripes is the number of lock files, one for each first digit of a key's hash. They are few and stay, so that no file
// that somebody may be waiting for is ever removed.
const stripes = 16

func openFolder(ctx context.Context, path string) (*folder, error) {
	private := path == ""
	if private {
		home, err := homeFolder()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(home, ".local", "state", "locker")
		if err := makePrivate(path); err != nil {
			return nil, err
		}
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	f := &folder{path: path, boot: filepath.Join(path, bootPrefix+boot), closed: make(chan struct{})}
	f.reserve = newLockFile(f, filepath.Join(path, "tokens.lock"))
	for i := range f.stripes {
		f.stripes[i] = newLockFile(f, filepath.Join(f.boot, fmt.Sprintf("%02d.lock", i)))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := f.checkLocal(); err != nil {
		return nil, err
	}
	if err := f.prepare(); err != nil {
		return nil, err
	}
	if f.share, err = shareOf(path); err != nil {
		return nil, err
	}
	return f, f.reserve.probe()
}

// checkLocal looks at the parent of a folder that is still missing, so that nothing is made where no lock can be.
func (f *folder) checkLocal() error {
	err := checkLocal(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = checkLocal(filepath.Dir(f.path))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: make the folder %s first", err, filepath.Dir(f.path))
	}
	return err
}

// makePrivate makes the user's own folder, which must not be another's: that one could tell this user what is free.
func makePrivate(path string) error {
	const cure = "or name another folder, as in file:///var/lib/myapp/locks"
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("%w: make that folder, %s", err, cure)
	}
	switch others, err := ownedByOther(path); {
	case err != nil:
		return err
	case others:
		return fmt.Errorf("the folder %s belongs to another user: give it to this one, %s", path, cure)
	}
	return nil
}

// homeFolder is that of the user whose rights the process has. It does not ask $HOME first: what sudo or cron put there
// must not decide who excludes whom.
func homeFolder() (string, error) {
	if u, err := user.Current(); err == nil && filepath.IsAbs(u.HomeDir) {
		return u.HomeDir, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("this user has no home folder for locks: name one, as in file:///var/lib/myapp/locks (%w)", err)
	}
	return home, nil
}

const bootPrefix = "locker-boot-"

// prepare makes the folders. What an earlier boot left behind is removed: its holders are gone.
func (f *folder) prepare() error {
	err := os.Mkdir(f.path, 0o777)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: make the folder %s first", err, filepath.Dir(f.path))
	}
	if err == nil || errors.Is(err, fs.ErrExist) {
		err = f.makeBoot()
	}
	if err != nil {
		return fmt.Errorf("%w: give a folder in which this user may write", err)
	}
	entries, err := os.ReadDir(f.path)
	if err != nil {
		return fmt.Errorf("%w: give a folder in which this user may read and write", err)
	}
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), bootPrefix) && e.Name() != filepath.Base(f.boot) {
			_ = os.RemoveAll(filepath.Join(f.path, e.Name())) // or the next one does it
		}
	}
	return nil
}

// shareOf is what a file must allow to group and others, because they may write in the folder: the umask of the first
// process that comes must not shut them out.
func shareOf(path string) (fs.FileMode, error) {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&0o022 == 0 {
		return 0, err // nobody but its owner writes
	}
	return info.Mode().Perm() & 0o066, nil
}

// makeBoot makes the folder of this boot. Who may write in the outer folder may write in this one too.
func (f *folder) makeBoot() error {
	share, err := shareOf(f.path)
	if err != nil {
		return err
	}
	err = os.Mkdir(f.boot, 0o777)
	if err == nil && share != 0 {
		var outer fs.FileInfo
		if outer, err = os.Stat(f.path); err == nil {
			err = os.Chmod(f.boot, outer.Mode()&(fs.ModePerm|fs.ModeSetgid))
		}
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	inner, err := os.Lstat(f.boot)
	if err == nil && !inner.IsDir() {
		err = fmt.Errorf("%s is not a folder", f.boot)
	}
	return err
}

// make opens a file for writing and makes it if it is missing, for all who may write in the folder.
func (f *folder) make(path string, flags int) (*os.File, error) {
	file, err := openFile(path, flags|os.O_CREATE, 0o666)
	if err != nil || f.share == 0 {
		return file, err
	}
	// Only the owner may change the mode, and only he has to: he has made the file.
	if info, err := file.Stat(); err == nil && info.Mode().Perm()&f.share != f.share {
		_ = file.Chmod(info.Mode().Perm() | f.share)
	}
	return file, nil
}

// replace overwrites a file.
func (f *folder) replace(path string, text []byte) error {
	file, err := f.make(path, os.O_WRONLY|os.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	return errors.Join(err, file.Close())
}

func (f *folder) close() error {
	err := f.reserve.close()
	for _, s := range f.stripes {
		err = errors.Join(err, s.close())
	}
	return err
}

// stripeOf is the stripe of the key with that hash.
func (f *folder) stripeOf(hash string) *lockFile {
	digit := strings.IndexByte("0123456789abcdef", hash[0])
	return f.stripes[max(digit, 0)]
}

func (f *folder) stateFile(key string) string { return filepath.Join(f.boot, fileOf(key)) }

// read looks at a lock without the flock: a file is replaced as a whole, so what is read was true a moment ago.
func (f *folder) read(key string) (*state, error) { return load(f.stateFile(key), key) }

// change is one step on one lock, under the flock of its stripe.
type change struct {
	ctx    context.Context
	folder *folder
	stripe *lockFile
	state  *state
	now    time.Duration // on the boot clock
	dirty  bool
	wake   []entry // who was granted the lock, or has lost it
}

// change makes a step. A lease that has ended is passed on first. What step answers is returned also if there was something to
// write. The functions in done run after a step that is written, while the flock is held.
func (f *folder) change(ctx context.Context, key string, step func(*change) error, done ...func()) error {
	stripe := f.stripeOf(hashOf(key))
	if err := stripe.lock(ctx); err != nil {
		return err
	}
	c := &change{ctx: ctx, folder: f, stripe: stripe}
	err := c.make(key, step)
	if err == nil {
		for _, d := range done {
			d()
		}
	}
	stripe.unlock()
	for _, e := range c.wake {
		f.tell(e)
	}
	return err
}

func (c *change) make(key string, step func(*change) error) (err error) {
	path := c.folder.stateFile(key)
	if c.state, err = load(path, key); err != nil {
		return err
	}
	c.now = bootNow()
	if err := c.settle(); err != nil {
		return err
	}
	answer := step(c)
	if err := c.settle(); err != nil {
		return err
	}
	if !c.dirty {
		return answer
	}
	if c.state.Holder == nil {
		err = os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	} else {
		err = c.write(path)
	}
	if err != nil {
		c.wake = nil // nothing has happened
		return err
	}
	return answer
}

// write replaces the file. There is no fsync: after a crash of the host nobody reads the file, and a crash of the
// process loses nothing that was written.
func (c *change) write(path string) error {
	text, err := c.state.encode()
	if err != nil {
		return err
	}
	temp := strings.TrimSuffix(path, stateSuffix) + tempSuffix
	if err := c.folder.replace(temp, text); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	// Some file systems write to the disk before a rename replaces a file, which takes ten times as long as all the
	// rest. Where two files can change places they do not.
	if c.state.found && exchange(temp, path) == nil {
		_ = os.Remove(temp) // if it stays, the next step overwrites it
		return nil
	}
	return os.Rename(temp, path)
}

// settle passes the lock on if its holder's time is over, or if it has none.
func (c *change) settle() error {
	s := c.state
	if s.heldAt(c.now) {
		return nil
	}
	if s.Holder != nil {
		c.free()
	}
	for len(s.Queue) > 0 {
		next := s.Queue[0]
		s.Queue = s.Queue[1:]
		if c.folder.alive(next) {
			c.wake = append(c.wake, next)
			return c.grant(next)
		}
	}
	return nil
}

// holds tells whether the request holds the lock.
func (c *change) holds(id string) bool { return c.state.Holder != nil && c.state.Holder.ID == id }

// free ends the holder's grant.
func (c *change) free() {
	c.state.Holder = nil
	c.dirty = true
}

// leave takes a request out of the queue, and tells whether it was there.
func (c *change) leave(id string) bool {
	for i, e := range c.state.Queue {
		if e.ID == id {
			c.state.Queue = append(c.state.Queue[:i:i], c.state.Queue[i+1:]...)
			c.dirty = true
			return true
		}
	}
	return false
}

// grant makes a request the holder of a lock that is free.
func (c *change) grant(e entry) error {
	token, err := c.stripe.nextToken(c.ctx)
	if err != nil {
		return err
	}
	c.now = bootNow() // the lease begins now, however long it took to get here
	c.state.Holder = &grant{entry: e, Token: token, Since: time.Now().UnixMicro(), Until: c.now + e.TTL}
	c.dirty = true
	return nil
}

// tell wakes who was granted a lock, or tells who has lost it. If that fails, the waiter's next look or the holder's next
// heartbeat tells.
func (f *folder) tell(e entry) {
	if e.Mailbox == "" {
		return
	}
	file, err := openFile(filepath.Join(f.boot, filepath.Base(e.Mailbox)), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return
	}
	_, _ = file.WriteString(e.ID + "\n")
	_ = file.Close()
}

// alive tells whether the process that asked still lives: it has its mailbox locked.
func (f *folder) alive(e entry) bool {
	file, err := openFile(filepath.Join(f.boot, filepath.Base(e.Mailbox)), os.O_RDONLY, 0)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) // no right to look, or no file left to open: better wait for a dead one
	}
	defer file.Close()
	locked, err := flockShared(file)
	return err != nil || !locked
}

// atomicWrite replaces a file such that it survives a crash of the host.
func (f *folder) atomicWrite(path string, text []byte) (err error) {
	temp := path + tempSuffix
	file, err := f.make(temp, os.O_WRONLY|os.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = bytes.NewReader(text).WriteTo(file)
	err = errors.Join(err, file.Sync())
	err = errors.Join(err, file.Close())
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
