//go:build unix

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// stop stops us, or all who run with us if pid is 0, and returns when we are continued.
func stop(pid int) {
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, unix.SIGCONT)
	defer signal.Stop(continued)
	_ = unix.Kill(pid, unix.SIGSTOP)
	<-continued // this thread may come here before the signal has stopped it
}

// orphaned tells whether no shell of this session looks after our process group, so that nobody would continue us.
func orphaned() bool {
	group := unix.Getpgrp()
	session, err := unix.Getsid(0)
	for parent := unix.Getppid(); err == nil && parent > 0; parent = parentOf(parent) {
		its, err := unix.Getsid(parent)
		if err != nil || its != session {
			return true
		}
		if its, err := unix.Getpgid(parent); err != nil || its != group {
			return false
		}
	}
	return true
}

// parentOf reads the parent of a process, behind the name in parentheses and the state; 0 if that cannot be told.
func parentOf(pid int) (parent int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil {
		_, _ = fmt.Sscanf(string(text[bytes.LastIndexByte(text, ')')+1:]), " %c %d", new(rune), &parent)
	}
	return parent
}

// terminal is the one that we were started at; nil if there is none.
type terminal struct {
	file *os.File
	lent bool // to the command
}

func openTerminal() *terminal {
	file, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil
	}
	return &terminal{file: file}
}

// ours tells whether the terminal talks to our process group.
func (t *terminal) ours() bool {
	if t == nil {
		return false
	}
	group, err := unix.IoctlGetInt(int(t.file.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

func (t *terminal) isLent() bool { return t != nil && t.lent }

// give makes the terminal talk to another group.
func (t *terminal) give(group int) {
	t.lent = true
	t.talkTo(group)
}

// take makes the terminal talk to our group again, and tells whether it was lent.
func (t *terminal) take() bool {
	if !t.isLent() {
		return false
	}
	t.lent = false
	t.talkTo(unix.Getpgrp())
	return true
}

// talkTo may be called from the background, where the terminal asks who does that to stop, unless he ignores it.
func (t *terminal) talkTo(group int) {
	signal.Ignore(unix.SIGTTOU)
	defer signal.Reset(unix.SIGTTOU)
	_ = unix.IoctlSetPointerInt(int(t.file.Fd()), unix.TIOCSPGRP, group)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil
}
