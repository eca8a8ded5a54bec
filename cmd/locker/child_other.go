//go:build !unix

package main

import (
	"errors"
	"os"

	"github.com/fec20105/locker"
)

var passedOn = []os.Signal{os.Interrupt}

// supervise: without process groups no command can be kept from outliving its lock.
func (o *runOptions) supervise(*locker.Lock) end {
	return end{err: errors.ErrUnsupported}
}

func endsWait(os.Signal) bool { return true }

func interrupt() {}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
