package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/fec20105/locker/internal/clock"
)

// event is one line of a history, and what a worker tells the process that started it. Times count from the beginning of the
// run, by the clock that all processes of a host share.
type event struct {
	At     time.Duration `json:"at"`
	Kind   string        `json:"kind"`
	Worker int           `json:"worker"` // 0 is the nemesis and the servers
	Life   int           `json:"life,omitempty"`
	Lock   int           `json:"lock,omitempty"` // counts the locks of one life
	Key    string        `json:"key,omitempty"`
	Token  uint64        `json:"token,omitempty"`
	Call   time.Duration `json:"call,omitempty"`  // of an acquired lock: when it was asked for
	Until  time.Duration `json:"until,omitempty"` // of a held lock: its deadline
	Text   string        `json:"text,omitempty"`  // which fault, or what a call answered

	Ask     int      `json:"ask,omitempty"`     // of a look or a write: what the answer repeats
	Seen    versions `json:"seen,omitzero"`     // of a write: what it is based on
	Refused bool     `json:"refused,omitempty"` // of a write: by the guard
	Sure    bool     `json:"sure,omitempty"`    // of a belief: the lock was trusted after the write, too
	Left    int      `json:"left,omitempty"`    // of a bye: open connections
}

// The kinds of events.
const (
	kindReady    = "ready"    // a worker has reached its server
	kindAcquired = "acquired" // the work begins to believe
	kindLook     = "look"     // it reads the registers
	kindWrite    = "write"    // it writes to them
	kindBelieved = "believed" // it believes no longer; At is the end of the belief
	kindReleased = "released" // Release has answered
	kindFailed   = "failed"   // Acquire has answered an error
	kindFault    = "fault"    // the nemesis does harm, or undoes it
	kindHeal     = "heal"     // everything works again
	kindProgress = "progress" // everybody and every key had a lock since
	kindEnded    = "ended"    // a process is gone
	kindBye      = "bye"      // a worker has closed everything
	kindVerdict  = "verdict"
)

// endOf begins the Text of a fault that is undone.
const endOf = "end of "

// versions are those of a key's two registers.
type versions struct {
	Guarded int `json:"guarded,omitempty"`
	Plain   int `json:"plain,omitempty"`
}

// now is a moment by the clock that all processes share.
func now(epoch time.Duration) time.Duration { return clock.System().Now().Boot - epoch }

// seconds is a moment as people read it.
func seconds(d time.Duration) string { return fmt.Sprintf("%.6f s", d.Seconds()) }

// String is the event on one line.
func (e event) String() string {
	who := fmt.Sprintf("worker %d", e.Worker)
	if e.Worker == 0 {
		who = "nemesis"
	}
	text := fmt.Sprintf("%-12s  %-9s %-8s", seconds(e.At), who, e.Kind)
	if e.Key != "" {
		text += fmt.Sprintf(" %s token %d", e.Key, e.Token)
	}
	switch e.Kind {
	case kindAcquired:
		text += fmt.Sprintf(", asked for at %s, trusted until %s", seconds(e.Call), seconds(e.Until))
	case kindBelieved:
		text += ", until then; trusted until " + seconds(e.Until)
	case kindWrite:
		text += fmt.Sprintf(", over version %d (guarded) and %d", e.Seen.Guarded, e.Seen.Plain)
		if e.Refused {
			text += ", refused by the guard"
		}
	}
	return strings.TrimSpace(text + " " + e.Text)
}

// history is the file of a run.
type history struct {
	file *os.File
	buf  *bufio.Writer
	enc  *json.Encoder
}

func newHistory(path string) (*history, error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	h := &history{file: file, buf: bufio.NewWriter(file)}
	h.enc = json.NewEncoder(h.buf)
	return h, nil
}

// note writes an event. What goes wrong is told by close.
func (h *history) note(e event) { _ = h.enc.Encode(e) }

func (h *history) close() error { return errors.Join(h.buf.Flush(), h.file.Close()) }

// readHistory reads the events of a span.
func readHistory(path string, from, to time.Duration) (events []event, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	for lines := json.NewDecoder(bufio.NewReader(file)); ; {
		var e event
		if err := lines.Decode(&e); errors.Is(err, io.EOF) {
			return events, nil
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if from <= e.At && e.At <= to {
			events = append(events, e)
		}
	}
}
