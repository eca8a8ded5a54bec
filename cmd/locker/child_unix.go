//go:build unix

package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fec20105/locker"
)

// passedOn are the signals that the command gets. A SIGPIPE of our own must not kill us, and is dropped: the command has its own.
var passedOn = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH, unix.SIGPIPE, unix.SIGTSTP,
}

// endsWait tells whether a signal that comes before there is a command ends us. It stops us if it is a Ctrl-Z.
func endsWait(s os.Signal) bool {
	switch s {
	case unix.SIGWINCH, unix.SIGPIPE:
		return false
	case unix.SIGTSTP:
		if !orphaned() {
			stop(unix.Getpid())
		}
		return false
	}
	return true
}

// child is the command while it runs, in a process group of its own.
type child struct {
	pid     int
	guard   *guard
	tty     *terminal
	stopped bool // by us
}

// supervise runs the command and returns when it has ended. What it has started is dead then too if the lock was lost.
func (o *runOptions) supervise(lock *locker.Lock) end {
	// The parent-death signal comes when the thread ends that has made the child, so that this one has to stay.
	runtime.LockOSThread()
	c, err := o.start(lock)
	if err != nil {
		return end{err: err}
	}
	ended, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		c.watch(o, lock, ended)
	}()
	status, err := c.wait(lock)
	close(ended)
	<-watched
	if lock.Err() != nil || c.stopped {
		c.signal(unix.SIGKILL) // what it has left behind must not outlive the lease
	}
	c.guard.dismiss()
	interrupted := c.tty.take()
	switch {
	case err != nil:
		return end{err: err}
	case status.Signaled():
		return end{
			code: exitSignal + int(status.Signal()), stopped: c.stopped,
			interrupted: interrupted && status.Signal() == unix.SIGINT,
		}
	}
	return end{code: status.ExitStatus(), stopped: c.stopped}
}

// interrupt ends us and those who run with us, a script for example, by the SIGINT of a Ctrl-C that only the command got.
func interrupt() {
	if signal.Ignored(unix.SIGINT) {
		return
	}
	signal.Reset(unix.SIGINT)
	_ = unix.Kill(0, unix.SIGINT)
	<-time.NewTimer(time.Second).C // it comes at once
}

func (o *runOptions) start(lock *locker.Lock) (*child, error) {
	c := &child{tty: openTerminal()}
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if c.tty != nil && c.tty.ours() && isTerminal(os.Stdin) && isTerminal(os.Stdout) && isTerminal(os.Stderr) {
		attributes.Foreground, attributes.Ctty = true, int(c.tty.file.Fd())
		c.tty.lent = true
	}
	dieWithParent(attributes)
	var err error
	// Not with package os, which first tries out in a process of its own what we have no use for.
	c.pid, _, err = syscall.StartProcess(o.path, o.argv, &syscall.ProcAttr{
		Env: o.environment(lock.Token()), Files: []uintptr{0, 1, 2}, Sys: attributes,
	})
	if err != nil {
		c.tty.take()
		return nil, err
	}
	return c, nil
}

// watch passes signals on, and stops the command when the lock is or will be lost.
func (c *child) watch(o *runOptions, lock *locker.Lock, ended <-chan struct{}) {
	lost := lock.Done()
	young, kill := time.NewTimer(guardAfter), time.NewTimer(time.Hour)
	defer young.Stop()
	defer kill.Stop()
	kill.Stop()
	for {
		select {
		case <-young.C:
			c.guard = newGuard(c.pid)
		case s := <-o.signals:
			if s != unix.SIGPIPE {
				c.signal(s.(syscall.Signal))
			}
		case <-o.warned:
			c.stopped = true
			c.terminate()
			kill.Reset(o.grace + o.grace/10) // the lease ends before, unless a renewal gets through after all
		case <-lost:
			lost = nil
			reason, _ := errors.AsType[*locker.LostError](lock.Err())
			switch {
			case reason == nil || reason.Reason == locker.ReasonExpired:
				c.signal(unix.SIGKILL)
			case reason.Reason == locker.ReasonMaxHold: // nobody else holds it before the deadline
				c.terminate()
				kill.Reset(min(o.grace, time.Until(lock.Deadline())))
			default:
				c.terminate()
				kill.Reset(o.grace)
			}
		case <-kill.C:
			c.signal(unix.SIGKILL)
		case <-ended:
			return
		}
	}
}

// signal sends a signal to the whole process group, whose number belongs to nobody else: the guard is in it.
func (c *child) signal(s syscall.Signal) { _ = unix.Kill(-c.pid, s) }

// terminate asks the group to end, also one that is stopped.
func (c *child) terminate() {
	c.signal(unix.SIGTERM)
	c.signal(unix.SIGCONT)
}

// wait waits for the command's end. When the command is stopped at the terminal (Ctrl-Z) we stop too, because the
// shell sees only us. Other children are orphans of the command, which are ours where we are the first process.
func (c *child) wait(lock *locker.Lock) (status unix.WaitStatus, err error) {
	for {
		pid, err := unix.Wait4(-1, &status, unix.WUNTRACED, nil)
		switch {
		case errors.Is(err, unix.EINTR), err == nil && pid != c.pid:
		case err != nil:
			return status, err
		case !status.Stopped():
			return status, nil
		default:
			c.suspend(lock, status.StopSignal())
		}
	}
}

// suspend does what is to be done about a command that has stopped.
func (c *child) suspend(lock *locker.Lock, why syscall.Signal) {
	wants := why == unix.SIGTTIN || why == unix.SIGTTOU // the terminal, which it does not have
	switch {
	case wants && c.tty.ours():
		// It runs beside others, in a pipeline, and did not get the terminal before it needed it.
	case !wants && why != unix.SIGTSTP && !c.tty.isLent():
		return // somebody has stopped it by hand, and will continue it
	case orphaned():
		// Nobody would continue us.
	default:
		if wants = c.tty.take() || wants; wants {
			stop(0)
		} else {
			stop(unix.Getpid()) // who else was to be stopped was told so, like us
		}
		// The shell has continued us, in the foreground or in the background.
	}
	if lock.Err() == nil {
		if wants && c.tty.ours() {
			c.tty.give(c.pid)
		}
		c.signal(unix.SIGCONT)
	}
}

// guard is a shell in the command's process group. It reads from a pipe that only we hold open; when that ends before the guard
// does, because we were killed, it kills the group and with it itself. The parent-death signal reaches the command
// alone, and its children not. A system without a shell does without.
type guard struct {
	shell *exec.Cmd
	alive io.WriteCloser
}

// guardAfter is how long a command runs before it gets a guard, which costs as much as a short command.
const guardAfter = 20 * time.Millisecond

const guardScript = `trap "" HUP INT QUIT TERM TSTP TTIN TTOU USR1 USR2 ALRM PIPE; read -r word; kill -s KILL 0`

func newGuard(group int) *guard {
	r, w, err := os.Pipe()
	if err != nil {
		return nil
	}
	defer r.Close()
	shell := exec.Command("/bin/sh", "-c", guardScript) //nolint:noctx // it ends with us
	shell.Stdin = r
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: group}
	if err := shell.Start(); err != nil {
		_ = w.Close()
		return nil
	}
	return &guard{shell, w}
}

// dismiss ends the guard.
func (g *guard) dismiss() {
	if g == nil {
		return
	}
	_ = g.shell.Process.Kill() // also if the group was stopped
	_ = g.alive.Close()
	_ = g.shell.Wait() // "killed"
}
