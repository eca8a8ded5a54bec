package servertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
)

// signalChildren signals the processes that a server has started, if it is of a kind that does. It waits until all of
// them have stopped or gone on, because a signal that is on its way is no fault yet.
func (p *process) signalChildren(signal syscall.Signal) error {
	if !p.family {
		return nil
	}
	for {
		states, err := p.children()
		if err != nil {
			return err
		}
		late := 0
		for pid, state := range states {
			stopped := strings.HasPrefix(state, "T")
			if dead := strings.HasPrefix(state, "Z"); dead || signal == syscall.SIGSTOP && stopped || signal == syscall.SIGCONT && !stopped {
				continue
			}
			late++
			if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("signal its process %d: %w", pid, err)
			}
		}
		if late == 0 {
			return nil
		}
	}
}

// children are the states of the server's processes, as ps shows them.
func (p *process) children() (map[int]string, error) {
	out, err := exec.CommandContext(context.Background(), "ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "state=").Output()
	if err != nil {
		return nil, fmt.Errorf("ps (of the package procps): %w", err)
	}
	states := make(map[int]string)
	for line := range bytes.Lines(out) {
		var pid, parent int
		var state string
		if _, err := fmt.Sscan(string(line), &pid, &parent, &state); err == nil && parent == p.cmd.Process.Pid {
			states[pid] = state
		}
	}
	return states, nil
}
