package servertest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// guard owns a folder and the processes that work in it, and sees to it that none of them outlives this program,
// however the program ends. A program cannot clean up after its own SIGKILL, so two shells wait for its end:
//
//   - The killer leads a process group in which all the servers run. It reads from a pipe that only this program
//     holds open, and at its end kills the group, itself included. A group cannot be mistaken for another one as
//     long as its leader lives, which a remembered process number can.
//   - The remover reads from a pipe that this program and every server hold open. So it removes the folder as soon
//     as nobody is left who could write to it, and not before.
//
// A normal end takes the same way, so that every test run tries it out. The kernel's own parent-death signal would not
// do: it fires when the thread that forked ends, reaches no grandchildren, and removes no folder.
type guard struct {
	folder  string
	killer  *exec.Cmd
	remover *exec.Cmd
	alive   *os.File            // held by this program alone
	inUse   *os.File            // held by this program and by every server
	account *syscall.Credential // under which servers run; nil: this program's
}

// When a program dies while its server is paused, the kernel sends SIGHUP to the whole group (it has become an orphan
// with a stopped member): that must not end the killer before its work is done.
const (
	// Processes of a server may have left the group, as those of PostgreSQL do. While their parents stand still their
	// numbers cannot become those of others. The kernel's SIGHUP comes with a SIGCONT, perhaps only now: a parent that goes on
	// may start others, so look again until there are none. Those whose parent is gone already work in the folder.
	killerScript = `trap "" HUP INT TERM; read -r line
servers=$(ps -A -o pid= -o pgid= | while read -r pid group; do [ "$group" != $$ ] || [ "$pid" = $$ ] || echo "$pid"; done)
for pass in 1 2 3 4 5 6 7 8 9; do
	kill -s STOP $servers
	children=$(ps -A -o pid= -o ppid= -o stat= | while read -r pid parent stat; do
		for s in $servers; do [ "$parent" != "$s" ] || [ "${stat#Z}" != "$stat" ] || echo "$pid"; done
	done)
	[ -n "$children" ] || break
	kill -s KILL $children
done
kill -s KILL $(ls -l /proc/[0-9]*/cwd 2>/dev/null | sed -n "s|.*/proc/\([0-9]*\)/cwd -> $1/.*|\1|p")
kill -s KILL 0`
	removerScript = `trap "" HUP INT TERM; read -r line; rm -rf -- "$1"`
)

func newGuard(name string) (*guard, error) {
	// The remover waits before there is a folder, so that no moment is left in which a folder has no remover.
	g := &guard{folder: filepath.Join(os.TempDir(), "locker-"+name+"-"+strings.ToLower(rand.Text()[:10]))}
	var err error
	if g.remover, g.inUse, err = startShell(removerScript, g.folder); err != nil {
		return nil, err
	}
	if g.killer, g.alive, err = startShell(killerScript, g.folder); err != nil {
		return nil, errors.Join(err, g.inUse.Close(), g.remover.Wait())
	}
	if err := os.Mkdir(g.folder, 0o755); err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

// startShell starts a shell in a process group of its own, so that it misses the Ctrl-C that ends this program, and
// returns the pipe from which its script reads. The folder is its first argument, also to tell people in ps whose it is.
func startShell(script, folder string) (*exec.Cmd, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	cmd := exec.CommandContext(context.Background(), "sh", "-c", script, "sh", folder)
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(err, w.Close())
	}
	return cmd, w, nil
}

// start runs a server under the guard.
func (g *guard) start(command []string) (*process, error) {
	log, err := os.OpenFile(g.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(context.Background(), command[0], command[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = g.folder, log, log
	cmd.ExtraFiles = []*os.File{g.inUse}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: g.killer.Process.Pid, Credential: g.account}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{}), polite: syscall.SIGTERM}
	go func() {
		defer close(p.done)
		_ = cmd.Wait() // cmd.ProcessState tells how it ended
	}()
	return p, nil
}

func (g *guard) logFile() string { return filepath.Join(g.folder, "log") }

// close kills what still runs and removes the folder. The shells are gone when it returns, and a server has ended, but
// its own waiting goroutine may not have noticed yet.
func (g *guard) close() error {
	err := g.alive.Close()
	_ = g.killer.Wait() // it killed itself
	err = errors.Join(err, g.inUse.Close())
	if e := g.remover.Wait(); e != nil {
		err = errors.Join(err, fmt.Errorf("remove %s: %w", g.folder, e))
	}
	return err
}

// process is one run of a server.
type process struct {
	cmd    *exec.Cmd
	done   chan struct{}  // closed when it has ended
	family bool           // it has processes of its own, which stop and die with it
	polite syscall.Signal // asks it to end
	stands bool           // it was paused
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// kill ends the process at once and waits until it is gone.
func (p *process) kill() error {
	if p.family && !p.ended() {
		// While it stands still it makes no more of them.
		if err := errors.Join(p.pause(), p.signalChildren(syscall.SIGKILL)); err != nil && !p.ended() {
			return err
		}
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	return nil
}

// stop lets the process end in its own way. A paused one goes on first.
func (p *process) stop(ctx context.Context) error {
	if err := p.cmd.Process.Signal(p.polite); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	if err := p.resume(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		select {
		case <-p.done:
			return nil
		case <-again.C: // a Redis that writes its whole data down refuses to end, and forgets that it was told to
			if err := p.cmd.Process.Signal(p.polite); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("it has not ended by itself: %w", context.Cause(ctx))
		}
	}
}

// pause returns when the process has stopped, not merely when it has been told to.
func (p *process) pause() error {
	if p.stands {
		return nil // the kernel tells of each stop once
	}
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		var status syscall.WaitStatus
		_, err := syscall.Wait4(p.cmd.Process.Pid, &status, syscall.WUNTRACED, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return err
		case status.Stopped():
			p.stands = true
			return p.signalChildren(syscall.SIGSTOP)
		default:
			return errors.New("it ended instead")
		}
	}
}

func (p *process) resume() error {
	p.stands = false
	return errors.Join(p.signalChildren(syscall.SIGCONT), p.cmd.Process.Signal(syscall.SIGCONT))
}
