//go:build !linux

package filebackend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"time"
)

// Elsewhere nobody has written and tried what these need: a clock that counts suspend, the same in all processes, and a
// name for the time since the last boot. Every New fails at bootID.

func bootNow() time.Duration { return 0 }

func bootID() (string, error) {
	return "", fmt.Errorf("locks in files work on Linux only, not on %s: use a server: %w", runtime.GOOS, errors.ErrUnsupported)
}

func flock(*os.File) (bool, error)       { return false, errors.ErrUnsupported }
func flockShared(*os.File) (bool, error) { return false, errors.ErrUnsupported }
func unflock(*os.File) error             { return errors.ErrUnsupported }
func exchange(string, string) error      { return errors.ErrUnsupported }
func checkLocal(string) error            { return errors.ErrUnsupported }
func ownedByOther(string) (bool, error)  { return false, errors.ErrUnsupported }

func openFile(string, int, fs.FileMode) (*os.File, error) { return nil, errors.ErrUnsupported }
