// Command containers makes images of servers, and runs the tests of this folder on them. The tests run locker's backends
// on real servers in containers, in versions that no single machine has, and cut networks that only containers have.
//
//	go run . images [redis:7.0 …]     makes images where none can be pulled
//	go run . images usual             pulls the images that the tests usually take, or makes theirs
//	go run . matrix [redis:7.0 …]     runs the tests on each version, and writes docs/tested-versions.md
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "containers:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch {
	case len(args) > 0 && args[0] == "images":
		return makeImages(ctx, args[1:])
	case len(args) > 0 && args[0] == "matrix":
		return runMatrix(ctx, args[1:])
	}
	return errors.New("usage: go run . images|matrix [version…]")
}
