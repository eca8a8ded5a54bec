//go:build unix

package conformance

import "golang.org/x/sys/unix"

// stop suspends the process. It returns when every thread stands still: the signal alone lets them run for a while.
func (c *child) stop() {
	c.signal(unix.SIGSTOP)
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(c.process.Process.Pid, &status, unix.WUNTRACED, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil || !status.Stopped():
			c.t.Fatalf("child process: it did not stop: %v, status %#x", err, status)
		}
		return
	}
}

// resume lets the process go on.
func (c *child) resume() { c.signal(unix.SIGCONT) }

func (c *child) signal(s unix.Signal) {
	if err := c.process.Process.Signal(s); err != nil {
		c.t.Fatalf("child process: %v: %v", s, err)
	}
}
