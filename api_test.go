package locker_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// TestAPI makes every change of the public API a change of a golden file, which a reviewer sees.
func TestAPI(t *testing.T) {
	golden(t, "testdata/api.golden", goTool(t, ".", "doc", "-all", "."))
}

// golden compares with a golden file. The first line that differs is enough to find out whether it is meant.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(string(want), "\n")
	line := 0
	for line < len(gotLines) && line < len(wantLines) && gotLines[line] == wantLines[line] {
		line++
	}
	t.Errorf("%s:%d is out of date: if the change is meant, run make update and review the diff\n got: %s\nwant: %s",
		file, line+1, strings.Join(gotLines[line:min(line+1, len(gotLines))], ""), strings.Join(wantLines[line:min(line+1, len(wantLines))], ""))
}
