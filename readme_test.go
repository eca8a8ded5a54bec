package locker_test

import (
	"context"
	"errors"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/fec20105/locker"

	_ "github.com/fec20105/locker/redisbackend"
)

// readmeExample is the code that README shows.
func readmeExample(ctx context.Context, charge func(context.Context, uint64) error, refund func(context.Context, *locker.LostError) error) error {
	client, err := locker.Open(ctx, os.Getenv("LOCKER_URL")) // redis://localhost:6379
	if err != nil {
		return err
	}
	defer client.Close()

	err = client.Do(ctx, "invoice/42", func(ctx context.Context, lock *locker.Lock) error {
		return charge(ctx, lock.Token()) // ctx ends, with the cause, the moment the lock can no longer be trusted
	}, locker.WithTTL(10*time.Second), locker.WithCompensation(refund))

	if errors.Is(err, locker.ErrLost) {
		log.Print("the lock was lost; what had been charged is refunded: ", err)
	}
	return err
}

// TestReadme holds README to the code: its Go stands in this file, and so compiles and runs.
func TestReadme(t *testing.T) {
	indent := regexp.MustCompile(`(?m)^\t+`)
	read := func(file string) string {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return indent.ReplaceAllString(string(text), "")
	}
	code, blocks := read("readme_test.go"), regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(read("README.md"), -1)
	if len(blocks) == 0 {
		t.Error("README shows no Go code")
	}
	for _, block := range blocks {
		if !strings.Contains(code, strings.TrimPrefix(block[1], "import ")) {
			t.Errorf("README shows code that is not in this file:\n%s", block[1])
		}
	}
}

// TestGuarantees holds docs/guarantees.md to the suite: the rows that it names exist.
func TestGuarantees(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("docs", "guarantees.md"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join("conformance", "rows_*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var rows strings.Builder
	for _, file := range files {
		code, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		rows.Write(code)
	}
	named := 0
	for _, list := range regexp.MustCompile(`[^*]\*([a-z-]+(?:,\s[a-z-]+)*)\*[^*]`).FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile(`,\s`).Split(list[1], -1) {
			if named++; name != "italics" && !strings.Contains(rows.String(), `"`+name+`"`) {
				t.Errorf("the document names the row %q, which the suite does not have", name)
			}
		}
	}
	if named < 20 {
		t.Errorf("the document names only %d rows: does this test still find them?", named)
	}
}

func TestReadmeExample(t *testing.T) {
	t.Setenv("LOCKER_URL", "mem://"+t.Name())
	var charged uint64
	charge := func(_ context.Context, token uint64) error {
		charged = token
		return nil
	}
	if err := readmeExample(t.Context(), charge, nil); err == nil || !strings.Contains(err.Error(), "WithCompensation(nil)") {
		t.Errorf("without a compensation: %v", err)
	}
	refund := func(context.Context, *locker.LostError) error { return nil }
	if err := readmeExample(t.Context(), charge, refund); err != nil || charged == 0 {
		t.Errorf("Do answered %v, charged under token %d", err, charged)
	}
}
