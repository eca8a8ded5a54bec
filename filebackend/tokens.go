package filebackend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"
)

// Tokens are counted in two steps. The file tokens says up to which number they may have been given out; it is written with
// fsync, and each stripe takes a block of numbers from it at a time. Within its block a stripe counts in its lock file, without
// fsync: that file does not outlive the boot, and after a crash the rest of the block is never used. A key
// always has the same stripe, so its tokens grow.

const (
	block    = 1 << 8 // few: all stripes together are at most 4 ms ahead of the clock then, when the folder is deleted
	maxToken = 1 << 53
)

// counter is what a stripe's lock file says. Its length is fixed, so that it is overwritten by one write within one page, which
// a killed process makes or does not make.
const counter = "%016d %016d\n"

// nextToken gives out a number, for who has the stripe's lock.
func (l *lockFile) nextToken(ctx context.Context) (uint64, error) {
	var last, limit uint64
	text := make([]byte, len(fmt.Sprintf(counter, 0, 0)))
	n, err := l.file.ReadAt(text, 0)
	switch {
	case n == 0 && errors.Is(err, io.EOF): // new in this boot
	case err != nil && !errors.Is(err, io.EOF):
		return 0, err
	default:
		if _, err := fmt.Sscanf(string(text), counter, &last, &limit); err != nil || n < len(text) || last > limit {
			return 0, fmt.Errorf("the file %s is damaged: end all processes that use the folder, then delete the folder %s; tokens go on growing",
				l.path, l.folder.boot)
		}
	}
	if last == limit {
		if last, err = l.folder.reserveBlock(ctx); err != nil {
			return 0, err
		}
		limit = last + block
	}
	last++
	_, err = l.file.WriteAt(fmt.Appendf(nil, counter, last, limit), 0)
	return last, err
}

const tokensFile = "locker-tokens 1 %d\n"

// reserveBlock takes a block of numbers that were never given out, and returns the one before the first.
func (f *folder) reserveBlock(ctx context.Context) (uint64, error) {
	if err := f.reserve.lock(ctx); err != nil {
		return 0, err
	}
	defer f.reserve.unlock()
	path := filepath.Join(f.path, "tokens")
	text, err := readFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	var next uint64
	if err == nil {
		if _, err := fmt.Sscanf(string(text), tokensFile, &next); err != nil || next == 0 {
			return 0, fmt.Errorf("the file %s is damaged, or of a later version of locker: update this program, or delete the file; "+
				"tokens then begin at the time of day, above all before if the clock was never set back", path)
		}
	}
	if day := uint64(time.Now().UnixMicro()); day < maxToken/2 {
		next = max(next, day)
	}
	if next > maxToken-block {
		return 0, fmt.Errorf("the file %s says that tokens are used up: delete it, they then begin at the time of day", path)
	}
	if err := f.atomicWrite(path, fmt.Appendf(nil, tokensFile, next+block)); err != nil {
		return 0, err
	}
	return next, nil
}
