package servertest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// redisConn speaks enough of Redis' protocol to control servers.
type redisConn struct {
	conn    net.Conn
	replies *bufio.Reader
}

// redisError is what a server has answered instead of a result.
type redisError string

func (e redisError) Error() string { return string(e) }

// askRedis sends one command, after a password if that is not empty. The network is "tcp" or "unix". The reply is a string,
// an int64, a []any of these, or nil.
func askRedis(ctx context.Context, network, addr, password string, command ...string) (reply any, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// A server that stands still must not hold up the whole test.
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	c := redisConn{conn, bufio.NewReader(conn)}
	if password != "" {
		if _, err := c.ask("AUTH", password); err != nil {
			return nil, err
		}
	}
	return c.ask(command...)
}

func (c redisConn) ask(command ...string) (any, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(command))
	for _, word := range command {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(word), word)
	}
	if _, err := io.WriteString(c.conn, b.String()); err != nil {
		return nil, err
	}
	return c.reply()
}

func (c redisConn) reply() (any, error) {
	line, err := c.replies.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return nil, errors.New("an empty reply")
	}
	kind, text := line[0], line[1:]
	if kind == '+' {
		return text, nil
	}
	if kind == '-' {
		return nil, redisError(text)
	}
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the reply %q makes no sense", line)
	case kind == ':':
		return n, nil
	case n < 0:
		return nil, nil
	case kind == '$':
		b := make([]byte, n+2)
		_, err := io.ReadFull(c.replies, b)
		return string(b[:n]), err
	case kind == '*':
		list := make([]any, n)
		for i := range list {
			if list[i], err = c.reply(); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	return nil, fmt.Errorf("the reply %q makes no sense", line)
}

// fields reads a reply that is a list of names and values.
func fields(reply any) map[string]string {
	list, _ := reply.([]any)
	found := make(map[string]string)
	for i := 0; i+1 < len(list); i += 2 {
		name, _ := list[i].(string)
		found[name], _ = list[i+1].(string)
	}
	return found
}

// infoField finds a field in the reply to INFO.
func infoField(reply any, name string) string {
	text, _ := reply.(string)
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
