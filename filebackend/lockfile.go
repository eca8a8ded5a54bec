package filebackend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/fec20105/locker"
)

// lockFile is a file that is locked with flock(2) and that stays where it is.
type lockFile struct {
	folder *folder
	path   string
	turn   chan struct{} // one goroutine of this Backend at a time; has room for the one token
	file   *os.File      // belongs to who has the turn; nil until it is needed
}

func newLockFile(f *folder, path string) *lockFile {
	return &lockFile{folder: f, path: path, turn: make(chan struct{}, 1)}
}

// lock waits for the file's lock. It asks again and again, because a thread that waits in flock(2) cannot be called
// back when ctx ends, and the holder may be a process that was stopped.
func (l *lockFile) lock(ctx context.Context) error {
	select {
	case l.turn <- struct{}{}:
	case <-ctx.Done():
		return l.busy(ctx.Err())
	case <-l.folder.closed:
		return locker.ErrClosed
	}
	err := l.lockFile(ctx)
	if err != nil {
		<-l.turn
	}
	return err
}

func (l *lockFile) lockFile(ctx context.Context) error {
	const least, most = 20 * time.Microsecond, 2 * time.Millisecond
	var timer *time.Timer
	for pause := least; ; pause = min(2*pause, most) {
		locked, err := l.try()
		if locked || err != nil {
			return err
		}
		if timer == nil {
			timer = time.NewTimer(pause)
			defer timer.Stop()
		} else {
			timer.Reset(pause)
		}
		select {
		case <-timer.C:
		case <-ctx.Done():
			return l.busy(ctx.Err())
		case <-l.folder.closed:
			return locker.ErrClosed
		}
	}
}

func (l *lockFile) busy(err error) error {
	return fmt.Errorf("%w while another process had the lock of %s", err, l.path)
}

// try opens the file if need be, and tries to lock it. A file that somebody has deleted is no lock any more: those
// who come later lock another one.
func (l *lockFile) try() (bool, error) {
	for range 3 {
		if err := l.probe(); err != nil {
			return false, err
		}
		if locked, err := flock(l.file); !locked || err != nil {
			return false, err
		}
		mine, err := l.file.Stat()
		if err != nil {
			return false, err
		}
		if now, err := os.Stat(l.path); err == nil && os.SameFile(mine, now) {
			return true, nil
		}
		if err := l.close(); err != nil {
			return false, err
		}
	}
	return false, fmt.Errorf("the lock file %s is deleted again and again: let no other program clean up the folder", l.path)
}

// probe opens the file, and makes it and the folder if they are missing.
func (l *lockFile) probe() (err error) {
	if l.file != nil {
		return nil
	}
	open := func() (err error) {
		l.file, err = l.folder.make(l.path, os.O_RDWR)
		return err
	}
	if err = open(); errors.Is(err, fs.ErrNotExist) {
		if err = l.folder.prepare(); err == nil {
			err = open()
		}
	}
	if err != nil {
		return fmt.Errorf("%w: give a folder in which this user may write", err)
	}
	return nil
}

func (l *lockFile) unlock() {
	_ = unflock(l.file) // the file is open, and so it works
	<-l.turn
}

func (l *lockFile) close() (err error) {
	if l.file != nil {
		err, l.file = l.file.Close(), nil
	}
	return err
}
