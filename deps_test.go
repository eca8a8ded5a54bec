package locker_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const self = "github.com/fec20105/locker"

// importRules says what each package of this module may import besides the standard library: packages of this module by
// their path in it, and other modules. What a module imports in turn is its own affair. A rule that ends in a slash
// holds for all packages below. Every package needs a rule; .golangci.yml repeats them for the editor.
var importRules = map[string][]string{
	".":                   {"internal/clock", "github.com/google/uuid"},
	"membackend":          {".", "internal/clock"},
	"filebackend":         {".", "internal/clock", "github.com/fsnotify/fsnotify", "golang.org/x/sys"},
	"redisbackend":        {".", "internal/clock", "github.com/redis/go-redis/v9"},
	"etcdbackend":         {".", "internal/clock", "go.etcd.io/etcd/client/v3", "go.etcd.io/etcd/api/v3", "go.uber.org/zap", "google.golang.org/grpc"},
	"pgbackend":           {".", "internal/clock", "github.com/jackc/pgx/v5"},
	"conformance":         {".", "internal/clock", "github.com/anishathalye/porcupine", "github.com/google/uuid", "golang.org/x/sys"}, // the last two come with "." anyway
	"internal/clock":      {"golang.org/x/sys"},
	"internal/servertest": {},
	"internal/redistest":  {".", "conformance", "redisbackend", "internal/servertest", "github.com/redis/go-redis/v9"},
	"internal/etcdtest":   {".", "conformance", "etcdbackend", "internal/servertest", "go.etcd.io/etcd/client/v3", "go.uber.org/zap"},
	"internal/pgtest":     {".", "conformance", "pgbackend", "internal/servertest", "github.com/jackc/pgx/v5"},
	"cmd/":                {".", "internal/clock", "conformance", "membackend", "filebackend", "redisbackend", "etcdbackend", "pgbackend", "golang.org/x/sys"},
	"torture":             {".", "internal/clock", "internal/servertest", "conformance", "filebackend", "redisbackend", "etcdbackend", "pgbackend"},
	"examples/":           {".", "membackend", "filebackend", "redisbackend", "etcdbackend", "pgbackend"},
}

// goPackage is what go list tells of a package.
type goPackage struct {
	ImportPath string
	Imports    []string
	Standard   bool
	Module     struct{ Path string }
}

// name is how importRules name it: by its path in this module, or by its module.
func (p goPackage) name() string {
	switch {
	case p.Module.Path != self:
		return p.Module.Path
	case p.ImportPath == self:
		return "."
	default:
		return strings.TrimPrefix(p.ImportPath, self+"/")
	}
}

func TestImports(t *testing.T) {
	packages := map[string]goPackage{}
	list := json.NewDecoder(strings.NewReader(goTool(t, ".", "list", "-deps", "-json=ImportPath,Imports,Standard,Module", "./...")))
	for {
		var p goPackage
		if err := list.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages[p.ImportPath] = p
	}
	if _, ok := packages[self]; !ok {
		t.Fatalf("go list does not know %s", self)
	}
	for _, p := range packages {
		if p.Module.Path != self {
			continue
		}
		allowed, ok := importRule(p.name())
		if !ok {
			t.Errorf("%s has no rule: add one to importRules and to .golangci.yml", p.name())
		}
		for _, imported := range p.Imports {
			other := packages[imported]
			if !other.Standard && !slices.ContainsFunc(allowed, func(rule string) bool { return covers(rule, other.name()) }) {
				t.Errorf("%s imports %s: importRules allow it only %q", p.name(), imported, allowed)
			}
		}
	}
}

func importRule(name string) ([]string, bool) {
	for rule, allowed := range importRules {
		if covers(rule, name) {
			return allowed, true
		}
	}
	return nil, false
}

func covers(rule, name string) bool {
	return rule == name || strings.HasSuffix(rule, "/") && strings.HasPrefix(name, rule)
}

// TestModules shows what a program that uses only Redis gets into its module graph. Each line may raise a version there.
func TestModules(t *testing.T) {
	repo, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	user := t.TempDir()
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	mod := "module example.com/user\n\ngo 1.26\n\nrequire " + self + " v0.0.0\n\nreplace " + self + " => " + repo + "\n"
	program := "package main\n\nimport _ \"" + self + "/redisbackend\"\n\nfunc main() {}\n"
	test := "package main\n\nimport _ \"" + self + "/conformance\"\n"
	for name, text := range map[string]string{"go.mod": mod, "go.sum": string(sums), "main.go": program, "main_test.go": test} {
		if err := os.WriteFile(filepath.Join(user, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	goTool(t, user, "list", "-deps", "-test", ".") // adds what the imports need
	golden(t, "testdata/modules.golden", goTool(t, user, "list", "-m", "-f", "{{if not .Main}}{{.Path}} {{.Version}}{{end}}", "all"))
}

// goTool runs the go command in a folder and returns what it prints.
func goTool(t *testing.T, folder string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod -buildvcs=false")
	if folder == "." {
		cmd.Env = append(cmd.Env, "GOFLAGS=-mod=readonly -buildvcs=false")
	}
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s: %v\n%s", cmd, err, exit.Stderr)
		}
		t.Fatalf("%s: %v", cmd, err)
	}
	return string(out)
}
