package redisbackend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// openTimeout bounds the check of the server in New.
const openTimeout = 5 * time.Second

// checkServer finds out early what would go wrong later.
func checkServer(ctx context.Context, client redis.UniversalClient) error {
	bounded, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	pipe := client.Pipeline()
	ping := pipe.Ping(bounded)
	server := pipe.Info(bounded, "server")
	replication := pipe.Info(bounded, "replication")
	_, err := pipe.Exec(bounded)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case isTimeout(err):
		return fmt.Errorf("the server did not answer within %v: check host and port", openTimeout)
	}
	if pong, pingErr := ping.Result(); pong != "PONG" {
		return explain(errors.Join(pingErr, err))
	}
	// INFO may be forbidden to this user: then the first call will tell.
	if version := field(server.Val(), "redis_version"); version != "" && !atLeast(version, 6, 2) {
		return fmt.Errorf("the server is Redis %s: the oldest that works is 6.2", version)
	}
	if field(server.Val(), "redis_mode") == "sentinel" {
		return errors.New("the server is a Sentinel: write redis+sentinel://host/NAME, with the name of the primary")
	}
	if role := field(replication.Val(), "role"); role != "" && role != "master" {
		return fmt.Errorf("the server is a read-only replica of %s: connect to that one",
			field(replication.Val(), "master_host")+":"+field(replication.Val(), "master_port"))
	}
	return nil
}

// checkChannels finds out whether this user may publish under the prefix. New users of Redis 7 may not, and nobody would
// know before somebody waits for a lock: then its release fails.
func checkChannels(ctx context.Context, client redis.UniversalClient, prefix string) error {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	err := client.Publish(ctx, prefix+"notices:", "").Err() // nobody listens there
	if redis.HasErrorPrefix(err, "NOPERM") {
		return explain(err)
	}
	return nil // of other errors the first call will tell
}

// field finds a field in the answer to INFO.
func field(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// atLeast compares a version such as 7.0.15. One that cannot be read is let through.
func atLeast(version string, major, minor int) bool {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) < 2 {
		return true
	}
	have1, err1 := strconv.Atoi(parts[0])
	have2, err2 := strconv.Atoi(parts[1])
	return err1 != nil || err2 != nil || have1 > major || have1 == major && have2 >= minor
}

// hints says what to do about errors whose own text does not.
var hints = []struct{ sign, hint string }{
	{"NOAUTH", "the server wants a password: give it in the URL, redis://user:password@host"},
	{"WRONGPASS", "the server refuses this user or password"},
	{"NOPERM", "the server's user lacks rights that locks need (see the package's documentation)"},
	{"READONLY", "the server is a read-only replica: connect to its primary"},
	{"OOM ", "the server is out of memory, and nothing was changed: raise its maxmemory, or have it evict other keys"},
	{"LOADING", "the server is still loading its data: try again in a moment"},
	{"MOVED ", "the server is one of a cluster: write redis+cluster://, or give a *redis.ClusterClient"},
	{"CLUSTERDOWN", "the cluster is down: some slots have no server, or most servers cannot be reached"},
	{"non local key", "the slot of this lock is being moved, and its keys are on either server"},
	{"can't parse", "the server does not speak the Redis protocol: check host and port"},
	{"invalid reply", "the server does not speak the Redis protocol: check host and port"},
	{"first record does not look like a TLS handshake", "the server does not speak TLS: use redis:// instead of rediss://"},
}

// explain puts in front of an error what to do about it.
func explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the server closed the connection (if that happens at once: is it a Redis, and does it want TLS, rediss://?): %w", err)
	}
	for _, h := range hints {
		if strings.Contains(err.Error(), h.sign) {
			return fmt.Errorf("%s: %w", h.hint, err)
		}
	}
	return err
}
