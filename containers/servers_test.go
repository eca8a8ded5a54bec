package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/modules/postgres"
	"github.com/testcontainers/testcontainers-go/modules/redis"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"

	"github.com/fec20105/locker/internal/etcdtest"
	"github.com/fec20105/locker/internal/redistest"
	"github.com/fec20105/locker/internal/servertest"
)

// imageOf is the image that a variable names, else the usual one. Where it cannot be had the test is skipped.
func imageOf(t testing.TB, server string) string {
	t.Helper()
	docker, err := engine()
	if err != nil {
		servertest.Skip(t, "containers", err.Error())
	}
	images := []string{os.Getenv("LOCKER_TEST_" + strings.ToUpper(server) + "_IMAGE")}
	if images[0] == "" {
		made, _ := find(usual[server].made)
		images = []string{usual[server].pull, made.image()}
	}
	for _, image := range images {
		if _, err := docker.ImageInspect(t.Context(), image); err == nil {
			return image
		}
	}
	provider, err := testcontainers.NewDockerProvider()
	if err != nil {
		t.Fatal(err)
	}
	defer provider.Close()
	if err := provider.PullImage(t.Context(), images[0]); err != nil {
		servertest.Skip(t, "containers", fmt.Sprintf("%s is not there and cannot be pulled (make images makes some): %v", images[0], err))
	}
	return images[0]
}

// redisRecipe makes a Redis or Valkey that is set up like that of servertest.
func redisRecipe(image string) recipe {
	return recipe{
		name: "redis", image: image, port: "6379/tcp", data: "/data", polite: "TERM", serves: servertest.RedisServes,
		run: func(ctx context.Context, image string, opts ...testcontainers.ContainerCustomizer) (testcontainers.Container, error) {
			c, err := redis.Run(ctx, image, opts...)
			if c == nil {
				return nil, err
			}
			return c.Container, err
		},
		opts: []testcontainers.ContainerCustomizer{testcontainers.WithCmd(
			"--dir", "/data", "--save", "", "--appendonly", "yes", "--appendfsync", "no", "--protected-mode", "no")},
	}
}

// postgresRecipe makes a PostgreSQL that is set up like that of servertest.
func postgresRecipe(image string) recipe {
	return recipe{
		name: "postgres", image: image, port: "5432/tcp", data: "/var/lib/postgresql", polite: "INT", serves: servertest.PostgresServes,
		run: func(ctx context.Context, image string, opts ...testcontainers.ContainerCustomizer) (testcontainers.Container, error) {
			c, err := postgres.Run(ctx, image, opts...)
			if c == nil {
				return nil, err
			}
			return c.Container, err
		},
		opts: []testcontainers.ContainerCustomizer{
			testcontainers.WithEnv(map[string]string{
				"POSTGRES_USER": "postgres", "POSTGRES_DB": "postgres", "POSTGRES_HOST_AUTH_METHOD": "trust",
				"PGDATA": "/var/lib/postgresql/locker", // a folder that no official image has plans for
			}),
			testcontainers.WithCmd("-c", "max_connections=500", "-c", "shared_buffers=32MB", "-c", "fsync=off"),
		},
	}
}

// etcdRecipe makes the i-th member of a cluster, which reach each other as m0, m1, ….
func etcdRecipe(image string, i, members int) recipe {
	var all []string
	for n := range members {
		all = append(all, fmt.Sprintf("m%d=http://m%d:2380", n, n))
	}
	return recipe{
		name: "etcd", image: image, port: "2379/tcp", data: "/var/lib/etcd", polite: "TERM", serves: servertest.EtcdServes, run: runAny,
		opts: []testcontainers.ContainerCustomizer{
			testcontainers.WithEntrypoint("/usr/local/bin/etcd"),
			testcontainers.WithCmd("--name", fmt.Sprintf("m%d", i), "--data-dir", "/var/lib/etcd/data", "--unsafe-no-fsync", "--log-level", "warn",
				"--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", fmt.Sprintf("http://m%d:2379", i),
				"--listen-peer-urls", "http://0.0.0.0:2380", "--initial-advertise-peer-urls", fmt.Sprintf("http://m%d:2380", i),
				"--initial-cluster", strings.Join(all, ",")),
		},
	}
}

// use is start for a test: the server is stopped at the test's end, and its log is shown if the test has failed.
func use(t testing.TB, r recipe) *servertest.Server {
	t.Helper()
	_, server, err := start(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	stopAfter(t, server)
	return server
}

func stopAfter(t testing.TB, server *servertest.Server) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last words of the server at %s:\n%s", server.Addr, server.Log())
		}
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// on attaches a server to a network of its test, under a name.
func (r recipe) on(n *testcontainers.DockerNetwork, name string) recipe {
	r.opts = append(r.opts[:len(r.opts):len(r.opts)], tcnetwork.WithNetwork([]string{name}, n))
	return r
}

func startRedis(t testing.TB, image string) *servertest.Server {
	t.Helper()
	server := use(t, redisRecipe(image).on(newNetwork(t), "redis"))
	server.URL = "redis://" + server.Addr
	tell(t, server)
	return server
}

func startPostgres(t testing.TB, image string) *servertest.Server {
	t.Helper()
	server := use(t, postgresRecipe(image).on(newNetwork(t), "postgres"))
	server.URL = "postgres://postgres@" + server.Addr + "/postgres?sslmode=disable"
	conn, err := pgx.Connect(t.Context(), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	version, _, _ := strings.Cut(conn.PgConn().ParameterStatus("server_version"), " ")
	t.Logf("the server is PostgreSQL %s", version)
	return server
}

func startEtcd(t testing.TB, image string) *servertest.Server {
	t.Helper()
	server := use(t, etcdRecipe(image, 0, 1).on(newNetwork(t), "m0"))
	server.URL = "etcd://" + server.Addr
	tellEtcd(t, server)
	return server
}

// tell logs the version of a Redis or Valkey.
func tell(t testing.TB, server *servertest.Server) {
	t.Helper()
	info := redistest.Direct(t, server).Info(t.Context(), "server").Val()
	for _, field := range []string{"valkey_version:", "redis_version:"} { // a Valkey tells both
		if _, version, ok := strings.Cut(info, field); ok {
			version, _, _ = strings.Cut(version, "\r")
			t.Logf("the server is %s %s", map[string]string{"v": "Valkey", "r": "Redis"}[field[:1]], version)
			return
		}
	}
	t.Error("the server does not tell its version")
}

func tellEtcd(t testing.TB, server *servertest.Server) {
	t.Helper()
	status, err := etcdtest.Direct(t, "etcd://"+server.Addr).Status(t.Context(), server.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the server is etcd %s", status.Version)
}

// startRedlock starts independent servers.
func startRedlock(t testing.TB, members int) *servertest.RedisGroup {
	t.Helper()
	r, n := redisRecipe(imageOf(t, "redis")), newNetwork(t)
	group := &servertest.RedisGroup{Members: make([]*servertest.Server, members)}
	var addrs []string
	for i := range members {
		group.Members[i] = use(t, r.on(n, fmt.Sprintf("r%d", i)))
		group.Members[i].URL = "redis://" + group.Members[i].Addr
		addrs = append(addrs, group.Members[i].Addr)
	}
	group.URL = "redlock://" + strings.Join(addrs, ",")
	tell(t, group.Members[0])
	return group
}

// etcdCluster is three members who reach each other over a network that no client uses.
type etcdCluster struct {
	servertest.EtcdCluster
	boxes []*box
	peers *testcontainers.DockerNetwork
}

func startEtcdCluster(t testing.TB) *etcdCluster {
	t.Helper()
	image := imageOf(t, "etcd")
	const members = 3
	c := &etcdCluster{boxes: make([]*box, members), peers: newNetwork(t, tcnetwork.WithInternal())}
	clients := newNetwork(t)
	c.Members = make([]*servertest.Server, members)
	errs := make([]error, members)
	var all sync.WaitGroup
	for i := range members { // at once: none serves before most of them run
		all.Go(func() {
			c.boxes[i], c.Members[i], errs[i] = start(t.Context(), etcdRecipe(image, i, members).on(clients, fmt.Sprintf("client-m%d", i)).on(c.peers, name(i)))
		})
	}
	all.Wait()
	var addrs []string
	for _, m := range c.Members {
		if m != nil {
			stopAfter(t, m)
			addrs = append(addrs, m.Addr)
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	c.URL = "etcd://" + strings.Join(addrs, ",")
	tellEtcd(t, c.Members[0])
	return c
}

func name(i int) string { return fmt.Sprintf("m%d", i) }

// isolate cuts a member off from the others. Clients still reach it.
func (c *etcdCluster) isolate(ctx context.Context, i int) error {
	_, err := c.boxes[i].docker.NetworkDisconnect(ctx, c.peers.ID, client.NetworkDisconnectOptions{Container: c.boxes[i].GetContainerID()})
	return err
}

// rejoin undoes isolate.
func (c *etcdCluster) rejoin(ctx context.Context, i int) error {
	_, err := c.boxes[i].docker.NetworkConnect(ctx, c.peers.ID, client.NetworkConnectOptions{
		Container: c.boxes[i].GetContainerID(), EndpointConfig: &network.EndpointSettings{Aliases: []string{name(i)}},
	})
	return err
}
