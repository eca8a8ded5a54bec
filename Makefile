# The tests need real servers; setup installs them. The linters are pinned in tools/ and etcd in tools/etcd, modules of
# their own, so that they raise no version in go.mod, and are built into bin/.

.DEFAULT_GOAL := help
.PHONY: help setup test check images mmdebstrap test-containers test-matrix bench torture model update

# What a test may not skip (see internal/servertest).
export LOCKER_TEST_REQUIRE ?= redis,etcd,postgres

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: bin/etcd ## install what the tests need (Debian, Ubuntu; elsewhere it says what to install)
	@set -e; \
	missing=; \
	command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing=redis-server; \
	command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing="$$missing pgbouncer"; \
	command -v "$$(go env CC)" >/dev/null || missing="$$missing gcc libc6-dev"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "setup: install a C compiler (for the race detector), PostgreSQL 14 or later, PgBouncer, and Redis 6.2 or later, or Valkey, with your system's package manager" >&2; exit 1; \
	fi; \
	if [ "$$(id -u)" -ne 0 ]; then sudo=sudo; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$sudo apt-get update -q; \
	$$sudo apt-get install -q -y --no-install-recommends $$missing

test: setup ## run every test, with the race detector, against real servers
	go test -race -shuffle=on -p 1 ./... # one after another: each loads the machine with servers, and is about time

check: bin/golangci-lint ## lint, check the format and go.mod
	bin/golangci-lint run ./...
	bin/golangci-lint fmt --diff
	go vet ./...
	go mod tidy -diff

images: mmdebstrap ## make images of servers where none can be pulled (Debian, Ubuntu): all, or IMAGES="redis:7.0 …"
	go -C containers run . images $(IMAGES)

mmdebstrap:
	@set -e; \
	if command -v mmdebstrap >/dev/null || ! command -v apt-get >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then sudo=sudo; fi; \
	$$sudo apt-get update -q; \
	$$sudo DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends mmdebstrap

test-containers: ## run the tests in containers, on the images that LOCKER_TEST_{REDIS,ETCD,POSTGRES}_IMAGE name, or usual ones
	go -C containers run . images usual || $(MAKE) images IMAGES=usual
	LOCKER_TEST_REQUIRE=containers go -C containers test -count=1 -timeout 30m .

test-matrix: mmdebstrap ## run them on every version that can be had, and write docs/tested-versions.md; or on VERSIONS="redis:8 …"
	go -C containers run . matrix $(VERSIONS)

bench: setup ## compare with other libraries, on private servers, in one run
	go -C bench run .

torture: setup ## torture every backend for TIME=20s, all at the same time, or the locks at URL=…
	go run ./torture $(if $(URL),-url '$(URL)') $(if $(TIME),-time $(TIME))

model: ## play the rules of Redlock on 20,000 seeds
	go test ./redisbackend -count=1 -v -run '^TestRedlockModel' -model 20000

update: ## write the golden files (testdata/, docs/command.md) anew; review the diff
	go test . -count=1 -run '^(TestAPI|TestModules)$$' -update
	go test ./cmd/locker -count=1 -run '^TestDocument$$' -update

bin/etcd: tools/etcd/go.mod tools/etcd/go.sum
	CGO_ENABLED=0 go build -C tools/etcd -o $(CURDIR)/bin/etcd go.etcd.io/etcd/server/v3
	@touch $@

bin/golangci-lint: tools/go.mod tools/go.sum
	GOBIN=$(CURDIR)/bin go install -C tools tool
	@touch $@
