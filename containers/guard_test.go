package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/network"

	"github.com/fec20105/locker/internal/etcdtest"
	"github.com/fec20105/locker/internal/pgtest"
	"github.com/fec20105/locker/internal/redistest"
)

// guardOf makes a copy of this program the guard of that session, which it outlives. It reads from a pipe that only the
// session's program holds open, and at its end removes all that the session has left: a killed program cannot do that by itself.
const guardOf = "LOCKER_CONTAINERS_GUARD"

// childState tells a copy of this program to start servers and to wait for its death.
const childState = "LOCKER_CONTAINERS_CHILD"

func TestMain(m *testing.M) {
	redistest.Serve()
	etcdtest.Serve()
	pgtest.Serve()
	log.SetDefault(log.NewNoopLogger()) // the errors tell enough
	// Its reaper is an image more that must be had, and waits for a time-out where the guard sees an end.
	err := os.Setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
	if guarded := os.Getenv(guardOf); guarded != "" && err == nil {
		err = guard(guarded)
	} else if state := os.Getenv(childState); state != "" && err == nil {
		err = child(state)
	} else if err == nil {
		code := m.Run()
		if err = stopGuard(); err == nil {
			os.Exit(code)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// theGuard is that of this program, and the pipe it reads from.
var theGuard struct {
	cmd   *exec.Cmd
	alive io.WriteCloser
}

// startGuard starts the guard in a process group of its own, so that it outlives what ends this program's.
func startGuard() error {
	cmd := exec.CommandContext(context.Background(), os.Args[0])
	cmd.Env = append(os.Environ(), guardOf+"="+session, childState+"=")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var err error
	if theGuard.alive, err = cmd.StdinPipe(); err != nil {
		return err
	}
	theGuard.cmd = cmd
	return cmd.Start()
}

// stopGuard takes the same way as a death of this program, but for its haste. What is found now is a test's mistake.
func stopGuard() error {
	if theGuard.cmd == nil {
		return nil
	}
	_, err := io.WriteString(theGuard.alive, "ended\n")
	return errors.Join(err, theGuard.alive.Close(), theGuard.cmd.Wait())
}

func guard(session string) error {
	signal.Ignore(os.Interrupt, syscall.SIGHUP, syscall.SIGTERM)
	said, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	docker, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	if string(said) == "ended\n" {
		left, err := leftBy(ctx, docker, session)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("the tests have left behind: %s", strings.Join(left, ", "))
		}
		return errors.Join(err, remove(ctx, docker, session))
	}
	// What the engine was asked for in the last moment may come late.
	for quiet := time.Now(); time.Since(quiet) < 5*time.Second; pause(ctx) {
		if left, err := leftBy(ctx, docker, session); err != nil || len(left) > 0 {
			quiet = time.Now()
			_ = remove(ctx, docker, session) // what cannot be removed now is found again
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func pause(ctx context.Context) {
	timer := time.NewTimer(200 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// leftBy names all that a session has made and not removed.
func leftBy(ctx context.Context, docker *testcontainers.DockerClient, session string) (left []string, err error) {
	filter := make(client.Filters).Add("label", sessionLabel+"="+session)
	containers, err1 := docker.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: filter})
	for _, c := range containers.Items {
		left = append(left, "container "+c.ID)
	}
	networks, err2 := docker.NetworkList(ctx, client.NetworkListOptions{Filters: filter})
	for _, n := range networks.Items {
		left = append(left, "network "+n.ID)
	}
	volumes, err3 := docker.VolumeList(ctx, client.VolumeListOptions{Filters: filter})
	for _, v := range volumes.Items {
		left = append(left, "volume "+v.Name)
	}
	return left, errors.Join(err1, err2, err3)
}

// remove removes all that a session has left.
func remove(ctx context.Context, docker *testcontainers.DockerClient, session string) error {
	left, err := leftBy(ctx, docker, session)
	if err != nil {
		return err
	}
	var errs []error
	for _, one := range left {
		var err error
		switch kind, id, _ := strings.Cut(one, " "); kind {
		case "container":
			_, err = docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		case "network":
			_, err = docker.NetworkRemove(ctx, id, client.NetworkRemoveOptions{})
		case "volume":
			_, err = docker.VolumeRemove(ctx, id, client.VolumeRemoveOptions{Force: true})
		}
		if !errdefs.IsNotFound(err) { // a volume goes with its container
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// child starts a server on a network of its own, tells its session, and waits for its death.
func child(state string) error {
	ctx := context.Background()
	b, server, err := start(ctx, redisRecipe(os.Getenv("LOCKER_TEST_REDIS_IMAGE")))
	if err != nil {
		return err
	}
	if _, err := network.New(ctx, network.WithLabels(labels())); err != nil {
		return err
	}
	switch state {
	case "paused":
		err = server.Pause(ctx)
	case "starting":
		fmt.Println(session)
		for err == nil {
			err = b.Wipe(ctx)
		}
	}
	if err != nil {
		return err
	}
	fmt.Println(session)
	select {}
}

// TestKilledProgram kills programs that have containers, a network and volumes.
func TestKilledProgram(t *testing.T) {
	t.Parallel()
	image := imageOf(t, "redis")
	docker, err := engine()
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"serving", "paused", "starting"} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), childState+"="+state, "LOCKER_TEST_REDIS_IMAGE="+image)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatalf("the child ended: %v", errors.Join(err, cmd.Wait()))
			}
			session := strings.TrimSpace(line)
			if left, err := leftBy(t.Context(), docker, session); err != nil || len(left) < 2 {
				t.Errorf("the search for what is left finds %q of a living program (%v)", left, err)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // killed
			var left []string
			for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); pause(t.Context()) {
				if left, err = leftBy(t.Context(), docker, session); err == nil && len(left) == 0 {
					return
				}
			}
			t.Errorf("left behind by a killed program: %q (%v)", left, err)
		})
	}
}
