package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"
	"github.com/testcontainers/testcontainers-go/wait"

	"github.com/fec20105/locker/internal/servertest"
)

// sessionLabel marks all that a run of this program makes, with what the run is called.
const sessionLabel = "locker.session"

// session is what this run is called.
var session = rand.Text()

// engine is the connection to Docker, made when the first test needs it.
var engine = sync.OnceValues(func() (*testcontainers.DockerClient, error) {
	ctx := context.Background()
	docker, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return nil, err
	}
	info, err := docker.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, err
	}
	if info.Info.Name == hostname() && os.Getenv("TESTCONTAINERS_HOST_OVERRIDE") == "" {
		// It runs here, beside this program, so its ports are here too, also if this is a container itself.
		return docker, errors.Join(os.Setenv("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1"), startGuard())
	}
	return docker, startGuard()
})

func hostname() string {
	name, _ := os.Hostname()
	return name
}

// labels are those of all that is made.
func labels() map[string]string { return map[string]string{sessionLabel: session} }

// recipe is how a server's container is made.
type recipe struct {
	name   string // of the sort of server, as in LOCKER_TEST_REQUIRE
	image  string
	run    func(ctx context.Context, image string, opts ...testcontainers.ContainerCustomizer) (testcontainers.Container, error)
	port   string // where it listens in the container, as "6379/tcp"
	data   string // the folder in the container that outlives its crashes
	polite string // the signal that ends it in good order
	opts   []testcontainers.ContainerCustomizer
	serves func(ctx context.Context, addr string) error
}

// runAny starts a container of any image.
func runAny(ctx context.Context, image string, opts ...testcontainers.ContainerCustomizer) (testcontainers.Container, error) {
	return testcontainers.Run(ctx, image, opts...)
}

// box is a server in a container. It keeps its port of the host, and until it is wiped its data.
type box struct {
	recipe
	docker *testcontainers.DockerClient
	host   string
	port   int // of the host
	testcontainers.Container
	paused, dead bool
}

var _ servertest.Remote = (*box)(nil)

// start starts a server, which is reached at a port of the host that stays the same.
func start(ctx context.Context, r recipe) (*box, *servertest.Server, error) {
	docker, err := engine()
	if err != nil {
		return nil, nil, err
	}
	b := &box{recipe: r, docker: docker}
	provider, err := testcontainers.NewDockerProvider()
	if err != nil {
		return nil, nil, err
	}
	defer provider.Close()
	if b.host, err = provider.DaemonHost(ctx); err != nil {
		return nil, nil, err
	}
	if b.port, err = servertest.FreePort(ctx); err != nil {
		return nil, nil, err
	}
	if err := b.make(ctx); err != nil {
		return nil, nil, errors.Join(err, b.Stop())
	}
	return b, servertest.NewRemote(r.name, "", b.addr(), b), nil
}

func (b *box) addr() string { return net.JoinHostPort(b.host, strconv.Itoa(b.port)) }

// make makes the container anew.
func (b *box) make(ctx context.Context) error {
	var err error
	b.Container, err = b.run(ctx, b.image, append([]testcontainers.ContainerCustomizer{
		testcontainers.WithLabels(labels()),
		testcontainers.WithExposedPorts(b.recipe.port),
		testcontainers.WithWaitStrategy(b),
		testcontainers.WithHostConfigModifier(func(c *container.HostConfig) {
			at := network.PortBinding{HostPort: strconv.Itoa(b.port)}
			if ip, err := netip.ParseAddr(b.host); err == nil && ip.IsLoopback() {
				at.HostIP = ip // nobody else can reach it
			}
			c.PortBindings = network.PortMap{network.MustParsePort(b.recipe.port): {at}}
			c.Mounts = append(c.Mounts, mount.Mount{Type: mount.TypeVolume, Target: b.data, VolumeOptions: &mount.VolumeOptions{Labels: labels()}})
			c.CPUShares, _ = strconv.ParseInt(os.Getenv("LOCKER_TEST_CPU_SHARES"), 10, 64) // for a machine with other work to do
		}),
	}, b.opts...)...)
	b.paused, b.dead = false, false
	return err
}

// WaitUntilReady waits until the server serves.
func (b *box) WaitUntilReady(ctx context.Context, target wait.StrategyTarget) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		serves := b.serves(ctx, b.addr())
		if serves == nil {
			return nil
		}
		if state, err := target.State(ctx); err == nil && !state.Running {
			return fmt.Errorf("it ended with %d; its last words:\n%s", state.ExitCode, logOf(target))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w; its last words:\n%s", ctx.Err(), serves, logOf(target))
		}
	}
}

// Pause implements [servertest.Remote], like what follows.
func (b *box) Pause(ctx context.Context) error {
	if b.paused {
		return nil
	}
	_, err := b.docker.ContainerPause(ctx, b.GetContainerID(), client.ContainerPauseOptions{})
	b.paused = err == nil
	return err
}

func (b *box) Resume(ctx context.Context) error {
	if !b.paused {
		return nil
	}
	b.paused = false
	_, err := b.docker.ContainerUnpause(ctx, b.GetContainerID(), client.ContainerUnpauseOptions{})
	return err
}

func (b *box) Kill(ctx context.Context) error {
	if b.dead {
		return nil
	}
	b.paused, b.dead = false, true
	return b.end(ctx, "KILL")
}

// end sends a signal, and waits for the container's end.
func (b *box) end(ctx context.Context, signal string) error {
	if _, err := b.docker.ContainerKill(ctx, b.GetContainerID(), client.ContainerKillOptions{Signal: signal}); err != nil {
		return err
	}
	ended := b.docker.ContainerWait(ctx, b.GetContainerID(), client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	select {
	case err := <-ended.Error:
		return err
	case <-ended.Result:
		return nil
	}
}

func (b *box) Start(ctx context.Context) error {
	if !b.dead {
		return errors.New("it is running")
	}
	_, err := b.docker.ContainerStart(ctx, b.GetContainerID(), client.ContainerStartOptions{})
	if err != nil {
		return err
	}
	b.dead = false
	return b.WaitUntilReady(ctx, b)
}

func (b *box) Crash(ctx context.Context) error {
	if err := b.Kill(ctx); err != nil {
		return err
	}
	return b.Start(ctx)
}

func (b *box) Restart(ctx context.Context) error {
	if err := b.Resume(ctx); err != nil {
		return err
	}
	if err := b.end(ctx, b.polite); err != nil {
		return err
	}
	b.dead = true
	return b.Start(ctx)
}

func (b *box) Wipe(ctx context.Context) error {
	if err := b.Stop(); err != nil {
		return err
	}
	return b.make(ctx)
}

func (b *box) Down() bool { return b.paused || b.dead }

func (b *box) Log() string { return logOf(b) }

func logOf(target wait.StrategyTarget) string {
	log, err := target.Logs(context.Background())
	if err != nil {
		return err.Error()
	}
	defer log.Close()
	text, err := io.ReadAll(log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Stop removes the container and its data.
func (b *box) Stop() error {
	if b.Container == nil {
		return nil
	}
	_, err := b.docker.ContainerRemove(context.Background(), b.GetContainerID(), client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	return err
}

// newNetwork makes a network for a test.
func newNetwork(t testing.TB, opts ...tcnetwork.NetworkCustomizer) *testcontainers.DockerNetwork {
	t.Helper()
	if _, err := engine(); err != nil {
		servertest.Skip(t, "containers", err.Error())
	}
	n, err := tcnetwork.New(t.Context(), append(opts, tcnetwork.WithLabels(labels()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}
