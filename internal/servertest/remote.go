package servertest

import "context"

// Remote is a private server that something else than this package runs, such as a container. Its methods are called one at
// a time, and do what those of Server do.
type Remote interface {
	Pause(context.Context) error
	Resume(context.Context) error
	Crash(context.Context) error
	Wipe(context.Context) error
	Restart(context.Context) error
	Kill(context.Context) error
	Start(context.Context) error
	Down() bool // it is paused, or was killed
	Log() string
	Stop() error
}

// NewRemote makes a Server of one that is run elsewhere and serves. The name is that of its sort, as in LOCKER_TEST_REQUIRE.
func NewRemote(name, rawURL, addr string, remote Remote) *Server {
	return &Server{URL: rawURL, Addr: addr, kind: kind{name: name}, remote: remote}
}
