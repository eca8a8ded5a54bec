package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"
)

// document is what a run of the matrix writes, for people.
const document = "../docs/tested-versions.md"

const documentHead = `# Tested versions

<!-- Written by make test-matrix; it keeps the lines of versions that were not asked for. -->

What the suite said when the container tests ran on these servers. Every server runs the whole [conformance suite](writing-a-backend.md);
Redis and Valkey also as five servers of a Redlock, etcd also as a cluster of three, and both with clients that reach a minority only. An image is
the official one, or made of the named release of Debian, or of etcd's module. *Not run* is not *passed*: there, nothing is known.

| server | image | version it tells | result | when |
|---|---|---|---|---|
`

// suites are the tests of each sort of server.
var suites = map[string][]string{
	"redis":    {"TestRedis", "TestRedlock", "TestRedlockMinority"},
	"valkey":   {"TestRedis", "TestRedlock", "TestRedlockMinority"},
	"etcd":     {"TestEtcd", "TestEtcdCluster", "TestEtcdMinority"},
	"postgres": {"TestPostgres"},
}

// runMatrix runs the tests on the versions named, or on all.
func runMatrix(ctx context.Context, names []string) error {
	for _, name := range names {
		if _, ok := find(name); !ok {
			return fmt.Errorf("no version %s: see versions.go", name)
		}
	}
	folder, err := os.MkdirTemp("", "locker-matrix-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	program := filepath.Join(folder, "containers.test")
	if _, err := output(ctx, "go", "test", "-c", "-o", program, "."); err != nil {
		return err
	}
	lines, err := earlierLines()
	if err != nil {
		return err
	}
	var failed []string
	for _, v := range versions {
		if len(names) > 0 && !slices.Contains(names, v.name()) {
			continue
		}
		r := v.test(ctx, program)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		say("%s: %s", v.name(), r.text())
		if r.failed {
			failed = append(failed, v.name())
		}
		lines[v.name()] = fmt.Sprintf("| %s | %s | %s | %s | %s |", v.name(), v.source(), r.version, r.text(), time.Now().UTC().Format(time.DateOnly))
		if err := writeDocument(ctx, lines); err != nil {
			return err
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed on %s", strings.Join(failed, ", "))
	}
	return nil
}

// source tells where an image comes from.
func (v version) source() string {
	switch {
	case v.pull != "":
		return "`" + v.pull + "`"
	case v.module != "":
		return "module " + v.module
	default:
		return "Debian " + v.release
	}
}

// verdict is what came of the tests on one version.
type verdict struct {
	version string // as the server tells it
	notRun  string // why, if the image cannot be had
	failed  bool
	suites  []string // what each said
}

func (v verdict) text() string {
	switch {
	case v.notRun != "":
		return "**not run**: " + v.notRun
	case v.failed:
		return "**failed**: " + strings.Join(v.suites, "; ")
	default:
		return "passed: " + strings.Join(v.suites, "; ")
	}
}

// test runs the tests on one version.
func (v version) test(ctx context.Context, program string) verdict {
	r := verdict{version: "-"}
	if v.pull == "" {
		if err := v.make(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			r.notRun = "its image could not be made"
			return r
		}
	} else if _, err := output(ctx, "docker", "image", "inspect", v.pull); err != nil {
		if _, err := output(ctx, "docker", "pull", "--quiet", v.pull); err != nil {
			fmt.Fprintln(os.Stderr, err)
			r.notRun = "its image could not be pulled"
			return r
		}
	}
	tests := suites[v.server]
	if v.refused {
		tests = []string{"TestRefused/" + v.name()}
	}
	for _, test := range tests {
		s, err := v.runTest(ctx, program, test)
		if s.version != "" {
			r.version = s.version
		}
		r.failed = r.failed || err != nil
		r.suites = append(r.suites, s.text(test, err))
	}
	return r
}

// counts is what one test said.
type counts struct {
	version                 string
	passed, skipped, failed int // rows
	names                   []string
}

func (c counts) text(test string, err error) string {
	test, refused, _ := strings.Cut(test, "/")
	if refused != "" && err == nil {
		return "it is refused, as too old"
	}
	words := []string{test}
	switch rows := c.passed + c.skipped + c.failed; {
	case err != nil && len(c.names) > 0:
		words = append(words, fmt.Sprintf("%d of %d rows failed (%s)", c.failed, rows, strings.Join(c.names, ", ")))
	case err != nil:
		words = append(words, "failed")
	case rows > 1:
		words = append(words, fmt.Sprintf("%d rows", c.passed))
		if c.skipped > 0 {
			words = append(words, fmt.Sprintf("(%d need what it has not)", c.skipped))
		}
	}
	return strings.Join(words, " ")
}

var (
	rowEnded = regexp.MustCompile(`^    --- (PASS|SKIP|FAIL): [^/]+/(\S+)`)
	itTells  = regexp.MustCompile(`the server is (\S+ \S+)$`)
)

// runTest runs one test, and reads what it prints.
func (v version) runTest(ctx context.Context, program, test string) (c counts, err error) {
	variable := "LOCKER_TEST_" + strings.ToUpper(strings.Replace(v.server, "valkey", "redis", 1)) + "_IMAGE"
	pattern := "^" + strings.ReplaceAll(test, "/", "$/^") + "$"
	cmd := exec.CommandContext(ctx, program, "-test.run", pattern, "-test.v", "-test.timeout", "20m")
	cmd.Env = append(os.Environ(), variable+"="+v.image(), "LOCKER_TEST_REQUIRE=containers")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return c, err
	}
	if err := cmd.Start(); err != nil {
		return c, err
	}
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		said.WriteString(lines.Text() + "\n")
		if m := itTells.FindStringSubmatch(lines.Text()); m != nil {
			c.version = m[1]
		}
		switch m := rowEnded.FindStringSubmatch(lines.Text()); {
		case m == nil:
		case m[1] == "PASS":
			c.passed++
		case m[1] == "SKIP":
			c.skipped++
		default:
			c.failed++
			c.names = append(c.names, m[2])
		}
	}
	if err = cmd.Wait(); err == nil && c.version == "" {
		err = errors.New("it passed without a server")
	}
	if err != nil {
		fmt.Fprint(os.Stderr, said.String())
	}
	return c, err
}

// earlierLines are the document's lines about each version.
func earlierLines() (map[string]string, error) {
	lines := map[string]string{}
	text, err := os.ReadFile(document)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, " | "); len(cells) == 5 {
			lines[strings.TrimPrefix(cells[0], "| ")] = strings.TrimSpace(line)
		}
	}
	return lines, nil
}

func writeDocument(ctx context.Context, lines map[string]string) error {
	engine, err := output(ctx, "docker", "version", "--format", "{{.Server.Version}}")
	if err != nil {
		return err
	}
	text := documentHead
	for _, v := range versions {
		line, ok := lines[v.name()]
		if !ok {
			line = fmt.Sprintf("| %s | %s | - | no result yet | - |", v.name(), v.source())
		}
		text += line + "\n"
	}
	text += fmt.Sprintf("\nThe last run was on Docker %s, %s, %s/%s, %d processors.\n", engine, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	return os.WriteFile(document, []byte(text), 0o644)
}
