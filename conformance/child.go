package conformance

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"time"
)

// child is a process that Serve runs in.
type child struct {
	t       *trial
	process *exec.Cmd
	in      io.WriteCloser
	answers *json.Decoder
}

// child starts a process. It is killed at the end of the row.
func (t *trial) child() *child {
	cmd := t.Process(t.ctx)
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatalf("child process: %v", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatalf("child process: %v", err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("child process: %v", err)
	}
	c := &child{t: t, process: cmd, in: in, answers: json.NewDecoder(out)}
	t.cleanup(c.kill)
	return c
}

// kill ends the process without notice, and waits for its end.
func (c *child) kill() {
	_ = c.process.Process.Kill() // it may have been killed already
	_ = c.process.Wait()         // "signal: killed"
}

// acquire makes the process acquire a key, once, with a heartbeat.
func (c *child) acquire(key string, ttl time.Duration) answer {
	a := c.do(command{Do: "acquire", Key: key, TTL: ttl})
	if a.Error != "" {
		c.t.Fatalf("the child process acquires %q, which is free: %s", key, a.Error)
	}
	return a
}

// do sends a command and waits for the answer.
func (c *child) do(cmd command) answer {
	c.send(cmd)
	return c.answer()
}

// send sends a command, also to a process that is stopped: it obeys when it goes on.
func (c *child) send(cmd command) {
	if err := json.NewEncoder(c.in).Encode(cmd); err != nil {
		c.t.Fatalf("child process: %v", err)
	}
}

// answer waits for the answer to the earliest command that has none.
func (c *child) answer() (a answer) {
	if err := c.answers.Decode(&a); err != nil {
		c.t.Fatalf("child process: no answer: %v", err)
	}
	return a
}
