# The tests need real servers; setup installs them. The linters are pinned in tools/, a module of its own, so that they
# raise no version in go.mod, and are built into bin/.

.DEFAULT_GOAL := help
.PHONY: help setup test check bench update

# What a test may not skip (see internal/servertest).
export LOCKER_TEST_REQUIRE ?= redis

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what the tests need (Debian, Ubuntu; elsewhere it says what to install)
	@set -e; \
	missing=; \
	command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing=redis-server; \
	command -v "$$(go env CC)" >/dev/null || missing="$$missing gcc libc6-dev"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "setup: install a C compiler (for the race detector) and Redis 6.2 or later, or Valkey, with your system's package manager" >&2; exit 1; \
	fi; \
	if [ "$$(id -u)" -ne 0 ]; then sudo=sudo; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$sudo apt-get update -q; \
	$$sudo apt-get install -q -y --no-install-recommends $$missing

test: setup ## run every test, with the race detector, against real servers
	go test -race -shuffle=on ./...

check: bin/golangci-lint ## lint, check the format and go.mod
	bin/golangci-lint run ./...
	bin/golangci-lint fmt --diff
	go vet ./...
	go mod tidy -diff

bench: setup ## compare with other libraries, on one Redis, in one run
	go -C bench run .

update: ## write the golden files (testdata/) anew; review the diff
	go test . -count=1 -run '^(TestAPI|TestModules)$$' -update

bin/golangci-lint: tools/go.mod tools/go.sum
	GOBIN=$(CURDIR)/bin go install -C tools tool
	@touch $@
