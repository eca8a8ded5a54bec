package main

import "slices"

// version is a server's version that the tests run on. Its image is pulled, or made where that is possible without a
// registry: of a Debian package, or of a Go module.
type version struct {
	server string // "redis", "valkey", "etcd", "postgres"
	number string // as people call it

	pull string // the official image; "" if it is made

	release, pkg string // the package of a release of Debian
	module       string // the version of the module of etcd's server

	refused bool // the backend must refuse it: it is older than what the backend needs
}

// versions is what make test-matrix runs.
var versions = []version{
	{server: "redis", number: "6.0", release: "bullseye", pkg: "redis-server", refused: true},
	{server: "redis", number: "6.2", pull: "redis:6.2"},
	{server: "redis", number: "7.0", release: "bookworm", pkg: "redis-server"},
	{server: "redis", number: "7.4", pull: "redis:7.4"},
	{server: "redis", number: "8.0", release: "trixie", pkg: "redis-server"},
	{server: "redis", number: "8", pull: "redis:8"},
	{server: "valkey", number: "8.1", release: "trixie", pkg: "valkey-server"},
	{server: "valkey", number: "8", pull: "valkey/valkey:8"},
	{server: "valkey", number: "9", pull: "valkey/valkey:9"},
	{server: "etcd", number: "3.5", module: "v3.5.35"},
	{server: "etcd", number: "3.6", module: "v3.6.16"},
	{server: "etcd", number: "3.7", module: "v3.7.3"}, // that of bin/etcd, so that it is compiled once
	{server: "postgres", number: "13", release: "bullseye", pkg: "postgresql-13", refused: true},
	{server: "postgres", number: "14", pull: "postgres:14"},
	{server: "postgres", number: "15", release: "bookworm", pkg: "postgresql-15"},
	{server: "postgres", number: "16", pull: "postgres:16"},
	{server: "postgres", number: "17", release: "trixie", pkg: "postgresql-17"},
	{server: "postgres", number: "18", release: "sid", pkg: "postgresql-18"},
}

// usual are the versions that the tests run on when no variable names an image: the current official one, or the one that
// is made where none can be pulled.
var usual = map[string]struct{ pull, made string }{
	"redis":    {"redis:8", "redis:7.0"},
	"etcd":     {"gcr.io/etcd-development/etcd:v3.7.3", "etcd:3.7"},
	"postgres": {"postgres:18", "postgres:15"},
}

// image is what the engine knows it by.
func (v version) image() string {
	if v.pull != "" {
		return v.pull
	}
	return "locker-test/" + v.server + ":" + v.number
}

// name is how the command line names it.
func (v version) name() string { return v.server + ":" + v.number }

// find returns the version of that name.
func find(name string) (version, bool) {
	i := slices.IndexFunc(versions, func(v version) bool { return v.name() == name })
	if i < 0 {
		return version{}, false
	}
	return versions[i], true
}
