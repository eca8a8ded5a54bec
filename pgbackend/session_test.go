package pgbackend

import (
	"net"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// TestMessagesInOtherLanguages is about servers whose messages are translated, the names of their severities too, and
// about poolers, which send those names only once.
func TestMessagesInOtherLanguages(t *testing.T) {
	t.Parallel()
	client, server := net.Pipe()
	defer server.Close()
	s := &session{conn: client, frontend: pgproto3.NewFrontend(client, client), ended: make(chan struct{}), gone: make(chan struct{})}
	var workers sync.WaitGroup
	s.begin(&workers)
	defer workers.Wait()
	defer s.close()

	st, err := s.enqueue("SELECT 1", nil)
	if err != nil {
		t.Fatal(err)
	}
	go s.flush()
	b := pgproto3.NewBackend(server, server)
	if _, err := b.Receive(); err != nil {
		t.Fatal(err)
	}
	b.Send(&pgproto3.NoticeResponse{Severity: "HINWEIS", SeverityUnlocalized: "NOTICE", Message: "not this"})
	b.Send(&pgproto3.NoticeResponse{Severity: "INFORMATION", SeverityUnlocalized: "INFO", Message: "t"})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	<-st.done
	if st.notice != "t" || st.err != nil {
		t.Errorf("the answer has the notice %q and the error %v", st.notice, st.err)
	}

	b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "query_wait_timeout"})
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	<-s.ended
	if codeOf(s.fate()) != "08P01" || s.certain() {
		t.Errorf("the session ended with %v; its process is gone: %v", s.fate(), s.certain())
	}
}
