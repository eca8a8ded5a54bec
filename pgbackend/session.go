package pgbackend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// session is one connection to the server. Statements of many goroutines travel on it, in the order in which they were
// sent; no caller's ctx ever ends it.
//
// Each statement is one message of the simple protocol. That is more than taste: idle_session_timeout, on which all rests,
// runs only after the server has answered a whole message. A client of the extended protocol that is cut off between its Parse
// and its Sync leaves the server waiting without any timer, and its locks are held for ever.
type session struct {
	conn     net.Conn
	frontend *pgproto3.Frontend
	pid      string // of the server's process; behind a pooler not that of the handshake
	started  string // when that process began: numbers of processes come again
	notify   func(payload string)

	mu       sync.Mutex
	pending  []*statement // sent or to be sent, not answered
	out      []byte       // to be sent
	unread   int          // bytes sent since the last answer
	flushing bool
	closing  bool
	err      error         // why it ended
	ended    chan struct{} // closed then
	over     bool          // the server itself said so: its process has let all locks go
	gone     chan struct{} // closed when that is certain
	onEnd    func()        // runs once, on the reader's goroutine
	writers  sync.WaitGroup
}

// statement is one message and its answer.
type statement struct {
	start   time.Time // before it was sent
	asksRow bool      // whether the answer always has one
	rows    [][]string
	notice  string // the text of the last INFO
	err     error
	finish  func(*statement) // runs on the reader's goroutine, in the order of the server
	done    chan struct{}
}

// inline is how much may be under way without an answer so that one more write surely does not block.
const inline = 8 << 10

// begin reads what the server sends until the session ends. onEnd then learns of it.
func (s *session) begin(workers *sync.WaitGroup) {
	workers.Go(func() {
		err := s.read()
		s.mu.Lock()
		s.err = fmt.Errorf("the session has ended: %w", err)
		left := s.pending
		s.pending = nil
		close(s.ended)
		if s.over {
			close(s.gone)
		}
		s.mu.Unlock()
		_ = s.conn.Close() // whatever it says, the session is over
		for _, st := range left {
			st.complete(s.err)
		}
		s.mu.Lock()
		onEnd := s.onEnd
		s.mu.Unlock()
		if onEnd != nil {
			onEnd()
		}
	})
}

func (st *statement) complete(err error) {
	if err != nil {
		st.err = err
	}
	if st.finish != nil {
		st.finish(st)
	}
	close(st.done)
}

// enqueue puts a statement behind those that were sent before. It goes out with the next flush, and its answer is there
// when done is closed. An error says that it will never go out; finish is not called then.
func (s *session) enqueue(sql string, finish func(*statement)) (*statement, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	if s.closing {
		return nil, errEnding
	}
	st := &statement{start: time.Now(), finish: finish, done: make(chan struct{})}
	st.asksRow = strings.HasPrefix(sql, "EXECUTE ") || strings.HasPrefix(sql, "SELECT pg_advisory") || strings.HasPrefix(sql, "SELECT pg_backend_pid()")
	size := len(s.out)
	var err error
	if s.out, err = (&pgproto3.Query{String: sql}).Encode(s.out); err != nil {
		s.out = s.out[:size]
		return nil, err
	}
	s.pending = append(s.pending, st)
	s.unread += len(s.out) - size
	return st, nil
}

// flush sends what is to be sent.
func (s *session) flush() {
	s.mu.Lock()
	if s.flushing || len(s.out) == 0 || s.err != nil {
		s.mu.Unlock()
		return
	}
	s.flushing = true
	mayBlock := s.unread > inline
	s.mu.Unlock()
	if mayBlock { // the link may be down, and a caller must not hang with it
		s.writers.Go(s.write)
		return
	}
	s.write()
}

// send is enqueue and flush.
func (s *session) send(sql string, finish func(*statement)) (*statement, error) {
	st, err := s.enqueue(sql, finish)
	if err == nil {
		s.flush()
	}
	return st, err
}

// write sends what is to be sent, also what others add meanwhile.
func (s *session) write() {
	var spare []byte
	for {
		s.mu.Lock()
		if len(s.out) == 0 || s.err != nil {
			s.flushing = false
			s.mu.Unlock()
			return
		}
		out := s.out
		s.out = spare
		s.mu.Unlock()
		if _, err := s.conn.Write(out); err != nil {
			_ = s.conn.Close() // the reader finds out and ends the session
		}
		spare = out[:0]
	}
}

// ask sends a statement and waits for its answer. A ctx that ends ends the waiting only.
func (s *session) ask(ctx context.Context, sql string) (*statement, error) {
	st, err := s.send(sql, nil)
	if err != nil {
		return nil, err
	}
	return st.wait(ctx)
}

func (st *statement) wait(ctx context.Context) (*statement, error) {
	select {
	case <-st.done:
		return st, st.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// read takes the server's answers in until the connection ends.
func (s *session) read() error {
	st := new(statement)
	var fatal error
	for {
		message, err := s.frontend.Receive()
		if err != nil {
			if fatal != nil {
				return fatal
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = errors.New("the server has closed the connection")
			}
			return err
		}
		switch m := message.(type) {
		case *pgproto3.DataRow:
			row := make([]string, len(m.Values))
			for i, value := range m.Values {
				row[i] = string(value)
			}
			st.rows = append(st.rows, row)
		case *pgproto3.NoticeResponse:
			if m.SeverityUnlocalized == "INFO" {
				st.notice = m.Message
			}
		case *pgproto3.NotificationResponse:
			s.mu.Lock()
			notify := s.notify
			s.mu.Unlock()
			if notify != nil {
				notify(m.Payload)
			}
		case *pgproto3.ErrorResponse:
			pgErr := pgconn.ErrorResponseToPgError(m)
			severity := cmp.Or(pgErr.SeverityUnlocalized, pgErr.Severity) // poolers send only one of them
			if severity == "FATAL" || severity == "PANIC" {
				fatal = pgErr
				s.mu.Lock()
				s.over = endsProcess(pgErr.Code)
				s.mu.Unlock()
			} else if st.err == nil {
				st.err = pgErr
			}
		case *pgproto3.ReadyForQuery:
			s.mu.Lock()
			if len(s.pending) == 0 {
				s.mu.Unlock()
				return errors.New("the server answered what nobody asked")
			}
			next := s.pending[0]
			s.pending[0] = nil
			s.pending = s.pending[1:]
			if len(s.pending) == 0 {
				s.unread = 0
			}
			s.mu.Unlock()
			next.rows, next.notice = st.rows, st.notice
			if next.asksRow && st.err == nil && len(st.rows) == 0 {
				next.complete(errOutOfStep)
				return errOutOfStep
			}
			next.complete(st.err)
			*st = statement{}
		}
	}
}

// endsProcess is true for the reasons for which a server's own process tells that it ends. A pooler's are others.
func endsProcess(code string) bool { return strings.HasPrefix(code, "57P0") }

// stalled is true if the oldest statement has not been answered for that long.
func (s *session) stalled(d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending) > 0 && time.Since(s.pending[0].start) > d
}

func (s *session) alive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err == nil && !s.closing
}

// fate is why the session ended; nil while it lives.
func (s *session) fate() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// certain is true if the server's process surely has let its locks go.
func (s *session) certain() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// vanished notes that the server's process was looked for and is no more.
func (s *session) vanished() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.certain() {
		close(s.gone)
	}
}

// close ends the session in good order as far as that is possible at once.
func (s *session) close() {
	s.mu.Lock()
	busy := s.flushing
	s.closing = true
	s.mu.Unlock()
	if !busy {
		_ = s.conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		_, _ = s.conn.Write([]byte{'X', 0, 0, 0, 4}) // the server sees the end of the connection anyway
	}
	_ = s.conn.Close()
	<-s.ended
	s.writers.Wait()
}

// errOutOfStep ends a session on which an answer is not the one to what was asked: nobody knows what it holds.
var errOutOfStep = errors.New("the server's answer has no row: it is not the one to this question")

var errEnding = errors.New("the session is being closed")

// listen says who hears of notifications and of the end. It is called before there can be any.
func (s *session) listen(notify func(payload string), onEnd func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notify, s.onEnd = notify, onEnd
}
