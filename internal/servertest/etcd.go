package servertest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// EtcdOptions asks for more than a plain server. Any of them makes it a private one.
type EtcdOptions struct {
	Private    bool     // even if LOCKER_TEST_ETCD is set: the test hurts the server
	TLS        bool     // clients must speak TLS
	ClientCert bool     // and show a certificate: that of the server is taken, and Server.TLS has it
	Durable    bool     // every write goes to the disk before it is answered, as in production: for benchmarks
	Args       []string // more of the server's own flags: "--quota-backend-bytes=…"
}

// StartEtcd returns the server named by LOCKER_TEST_ETCD if that is set and the options are zero, else a private etcd
// of one member. The caller stops it.
func StartEtcd(ctx context.Context, opts EtcdOptions) (*Server, error) {
	private := opts.Private || opts.TLS || opts.ClientCert || opts.Durable || len(opts.Args) > 0
	if given := os.Getenv("LOCKER_TEST_ETCD"); given != "" && !private {
		return givenEtcd(ctx, given)
	}
	program, err := etcdProgram()
	if err != nil {
		return nil, err
	}
	peer, err := FreePort(ctx)
	if err != nil {
		return nil, fmt.Errorf("servertest: start etcd: %w", err)
	}
	return startEtcdMember(ctx, program, opts, 0, []int{peer})
}

// startEtcdMember starts the i-th of the members that have these peer ports. It serves once most of them run.
func startEtcdMember(ctx context.Context, program string, opts EtcdOptions, i int, peers []int) (*Server, error) {
	var cert certificate
	var err error
	if opts.TLS || opts.ClientCert {
		if cert, err = newCertificate(); err != nil {
			return nil, err
		}
	}
	api := etcdAPI{scheme: "http"}
	if cert.pool != nil {
		api = etcdAPI{scheme: "https", tls: &tls.Config{RootCAs: cert.pool, MinVersion: tls.VersionTLS12}}
	}
	k := kind{name: "etcd"}
	k.prepare = func(folder string, port int) ([]string, error) {
		api.addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		command := append([]string{program}, etcdArgs(folder, api, i, peers)...)
		if !opts.Durable {
			// Every write is handed to the kernel before it is answered, so a killed server comes back with all that
			// it has answered. To wait for the disk as well would only help against a crash of the whole machine.
			command = append(command, "--unsafe-no-fsync")
		}
		if cert.pool == nil {
			return append(command, opts.Args...), nil
		}
		if err := cert.write(certFile(folder), keyFile(folder)); err != nil {
			return nil, err
		}
		command = append(command, "--cert-file", certFile(folder), "--key-file", keyFile(folder))
		if opts.ClientCert {
			command = append(command, "--client-cert-auth", "--trusted-ca-file", certFile(folder))
			pair, err := tls.LoadX509KeyPair(certFile(folder), keyFile(folder))
			if err != nil {
				return nil, err
			}
			api.tls.Certificates = []tls.Certificate{pair}
		}
		return append(command, opts.Args...), nil
	}
	k.ready = func(ctx context.Context, _ string) error { return api.healthy(ctx) }
	s, err := start(ctx, k)
	if err != nil {
		return nil, err
	}
	s.URL = "etcd://" + s.Addr
	if cert.pool != nil {
		s.URL, s.TLS = "etcds://"+s.Addr, api.tls
	}
	return s, nil
}

// CertFiles are the server's certificate, which is its own authority, and its key, in PEM.
func (s *Server) CertFiles() (cert, key string) {
	return certFile(s.guard.folder), keyFile(s.guard.folder)
}

func etcdArgs(folder string, api etcdAPI, i int, peers []int) []string {
	var members []string
	for n, port := range peers {
		members = append(members, fmt.Sprintf("m%d=http://127.0.0.1:%d", n, port))
	}
	client, peer := api.scheme+"://"+api.addr, fmt.Sprintf("http://127.0.0.1:%d", peers[i])
	return []string{
		"--name", "m" + strconv.Itoa(i),
		"--data-dir", filepath.Join(folder, "data"),
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--initial-cluster", strings.Join(members, ","),
		"--initial-cluster-token", members[0],
		"--log-level", "warn",
		// A member that starts again and finds more than 5,000 entries to apply refuses requests and fills its log meanwhile.
		"--snapshot-count", "1000",
	}
}

// etcdProgram finds the etcd that make setup has built, in the repository round the working folder, or one in PATH.
func etcdProgram() (string, error) {
	folder, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		program := filepath.Join(folder, "bin", "etcd")
		if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return program, nil
		}
		parent := filepath.Dir(folder)
		if parent == folder {
			return lookPath("make setup, which builds it into bin/", "etcd")
		}
		folder = parent
	}
}

// etcdAPI is the part of a member's API that speaks HTTP and JSON.
type etcdAPI struct {
	scheme, addr string
	tls          *tls.Config
}

// healthy answers nil once the member knows a leader and serves.
func (a *etcdAPI) healthy(ctx context.Context) error {
	var health struct {
		Health, Reason string
	}
	if err := a.call(ctx, http.MethodGet, "/health", nil, &health); err != nil {
		return err
	}
	if health.Health != "true" {
		return fmt.Errorf("unhealthy: %s", health.Reason)
	}
	return nil
}

// etcdStatus is what a member says of itself. Numbers of 64 bits are texts in JSON.
type etcdStatus struct {
	Header struct {
		Member string `json:"member_id"`
	}
	Leader string
}

func (a *etcdAPI) status(ctx context.Context) (s etcdStatus, err error) {
	return s, a.call(ctx, http.MethodPost, "/v3/maintenance/status", struct{}{}, &s)
}

func (a *etcdAPI) call(ctx context.Context, method, path string, request, reply any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, a.scheme+"://"+a.addr+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: a.tls, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", path, resp.Status, bytes.TrimSpace(answer))
	}
	return json.Unmarshal(answer, reply)
}

// givenEtcd finds out whether anybody is there, so that a wrong address fails at once and in clear words.
func givenEtcd(ctx context.Context, rawURL string) (*Server, error) {
	const name = "servertest: LOCKER_TEST_ETCD"
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.Scheme != "etcd" && u.Scheme != "etcds" {
		return nil, errors.New(name + " is no URL of the form etcd://[user:password@]host:port")
	}
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "2379")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s names a server that cannot be reached: %w", name, err)
	}
	return &Server{URL: rawURL, Addr: addr, kind: kind{name: "etcd"}}, conn.Close()
}
