package filebackend

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fec20105/locker"
)

// state is what the file of one lock says. The file is there while somebody holds the lock.
type state struct {
	Key    string  `json:"key"`
	Holder *grant  `json:"holder,omitempty"`
	Queue  []entry `json:"queue,omitempty"` // first come, first served

	found bool // there is a file
}

// entry is a request.
type entry struct {
	ID      string        `json:"id"`
	Label   string        `json:"label,omitempty"`
	TTL     time.Duration `json:"ttl_ns"`
	Mailbox string        `json:"mailbox,omitempty"` // of the process that asks
}

// grant is a request that was granted.
type grant struct {
	entry
	Token uint64        `json:"token"`
	Since int64         `json:"since_unix_us"` // for people
	Until time.Duration `json:"until_boot_ns"` // on the boot clock
}

// The first line of a state file: what it is, its version, and the CRC-32 of the rest.
const (
	magic   = "locker-state"
	version = 1
)

func (s *state) encode() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%s %d %08x\n%s\n", magic, version, crc32.ChecksumIEEE(body), body), nil
}

// decode reads a state file of a key, or of any if key is "". It never takes damage for a lock that is free.
func decode(path, key string, text []byte) (*state, error) {
	damaged := func(why string) error {
		return fmt.Errorf("the state file %s is damaged (%s), so that nobody can tell who holds this lock: "+
			"make sure that no process works under it, then delete the file", path, why)
	}
	head, body, _ := bytes.Cut(text, []byte("\n"))
	body = bytes.TrimSuffix(body, []byte("\n"))
	var word string
	var written int
	var sum uint32
	if n, _ := fmt.Sscanf(string(head), "%s %d %x", &word, &written, &sum); n < 2 || word != magic {
		return nil, damaged("it does not begin like one")
	}
	if written > version {
		return nil, fmt.Errorf("the state file %s has the format %d of a later version of locker, and this one knows %d: "+
			"update this program", path, written, version)
	}
	if crc32.ChecksumIEEE(body) != sum {
		return nil, damaged("its checksum is wrong")
	}
	s := &state{found: true}
	if err := json.Unmarshal(body, s); err != nil {
		return nil, damaged(err.Error())
	}
	if key != "" && s.Key != key || filepath.Base(path) != fileOf(s.Key) {
		return nil, damaged("it is that of another lock")
	}
	return s, nil
}

const (
	statePrefix = "k-"
	stateSuffix = ".json"
	tempSuffix  = ".tmp"
)

// fileOf is the name of a key's file. It begins with what it can show of the key, for people, and a 128-bit hash of all.
func fileOf(key string) string {
	readable := strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' {
			return r
		}
		return '-'
	}, key)
	return statePrefix + readable[:min(len(readable), 40)] + "-" + hashOf(key) + stateSuffix
}

// hashOf is what tells keys apart: 32 hexadecimal digits.
func hashOf(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:16])
}

// hashIn is the hash in the name of a state file, or of a temporary one.
func hashIn(file string) string {
	stem, _, _ := strings.Cut(file, ".")
	return stem[strings.LastIndexByte(stem, '-')+1:]
}

// load reads a state file. Without a file the lock is free.
func load(path, key string) (*state, error) {
	text, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &state{Key: key}, nil
	}
	if err != nil {
		return nil, err
	}
	return decode(path, key, text)
}

func readFile(path string) ([]byte, error) {
	file, err := openFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(file)
}

func (s *state) heldAt(now time.Duration) bool { return s.Holder != nil && s.Holder.Until > now }

// place is that of a request in the queue of a lock that is held, or nil.
func (s *state) place(req locker.Request, now time.Duration) *place {
	if !s.heldAt(now) {
		return nil
	}
	for i, e := range s.Queue {
		if e.ID == req.ID {
			return &place{held: *s.heldError(now), number: i}
		}
	}
	return nil
}

func (s *state) heldError(now time.Duration) *locker.HeldError {
	return &locker.HeldError{Key: s.Key, Holder: s.Holder.Label, Remaining: s.Holder.Until - now}
}
