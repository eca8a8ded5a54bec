package filebackend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fec20105/locker"
)

// Guard writes files in a folder and refuses writers whose lock was lost: beside each file stands the greatest token that it
// was written with, and a write with an older one changes nothing. That protects a file even from a process that
// was stopped for an hour and does not know yet that its lock is gone, as long as all writers go through a Guard.
//
// A value is an ordinary file, which anybody can read; it is replaced as a whole. The token of the file report.csv is in
// .report.csv.token, which stays.
type Guard struct{ folder string }

// NewGuard makes a Guard for the files of a folder, which must exist.
func NewGuard(folder string) *Guard { return &Guard{folder: folder} }

// Set writes a file under the token of a lock that protects it. It answers [locker.ErrStaleToken], and writes nothing,
// if a greater token has written before. The same token may write any number of times. After nil the file survives a
// crash of the host; after another error it has the old content or the new.
func (g *Guard) Set(ctx context.Context, file string, value []byte, token uint64) error {
	fail := func(err error) error {
		return &locker.Error{Op: "guard", Key: file, Backend: name, Err: err}
	}
	if token == 0 {
		return fail(errors.New("the token is zero: give that of a held lock"))
	}
	seen, err := g.open(ctx, file)
	if err != nil {
		return fail(err)
	}
	defer seen.Close() // and with it the flock
	newest, err := readToken(seen)
	switch {
	case err != nil:
		return fail(err)
	case newest > token:
		return fmt.Errorf("%w: %q was written with token %d, which is greater than %d", locker.ErrStaleToken, file, newest, token)
	case newest < token:
		// First the token: should the host crash now, older writers are refused and the old content stays.
		if _, err := seen.WriteAt(fmt.Appendf(nil, "%016d\n", token), 0); err != nil {
			return fail(err)
		}
		if err := errors.Join(seen.Sync(), syncFolder(filepath.Dir(seen.Name()))); err != nil {
			return fail(err)
		}
	}
	if err := new(folder).atomicWrite(filepath.Join(g.folder, file), value); err != nil {
		return fail(err)
	}
	return nil
}

// Get reads a file and the token of the newest writer. A file that was never written has neither.
func (g *Guard) Get(ctx context.Context, file string) (value []byte, token uint64, err error) {
	fail := func(err error) ([]byte, uint64, error) {
		return nil, 0, &locker.Error{Op: "guard", Key: file, Backend: name, Err: err}
	}
	seen, err := g.open(ctx, file)
	if err != nil {
		return fail(err)
	}
	defer seen.Close()
	if token, err = readToken(seen); err != nil {
		return fail(err)
	}
	value, err = os.ReadFile(filepath.Join(g.folder, file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	return value, token, nil
}

// open opens and locks the file of a file's token.
func (g *Guard) open(ctx context.Context, file string) (*os.File, error) {
	if !filepath.IsLocal(file) || filepath.Base(file) == "." {
		return nil, errors.New("that is no file in the guard's folder: give a name without .. and without a leading slash")
	}
	path := filepath.Join(g.folder, filepath.Dir(file), "."+filepath.Base(file)+".token")
	seen, err := openFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		locked, err := flock(seen)
		if locked {
			return seen, nil
		}
		if err == nil {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
				timer.Stop()
				err = fmt.Errorf("%w while another process writes the file", ctx.Err())
			}
		}
		return nil, errors.Join(err, seen.Close())
	}
}

// readToken reads a token's file; one that is empty was made just now.
func readToken(seen *os.File) (token uint64, err error) {
	text, err := io.ReadAll(io.NewSectionReader(seen, 0, 64))
	if err != nil || len(text) == 0 {
		return 0, err
	}
	if _, err := fmt.Sscanf(string(text), "%016d\n", &token); err != nil || token == 0 {
		return 0, fmt.Errorf("the file %s is damaged: make sure that no old writer is left, then delete it", seen.Name())
	}
	return token, nil
}
