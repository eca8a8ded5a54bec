package httplock

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocument holds docs/writing-a-backend.md to the code: each block of Go in it stands in a file of this folder, and
// so compiles and passes the suite; each row it names exists; and the example is as small as it says.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "writing-a-backend.md"))
	if err != nil {
		t.Fatal(err)
	}
	code := readAll(t, "*.go")
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) == 0 {
		t.Error("the document has no Go code")
	}
	for _, block := range blocks {
		if !strings.Contains(code, block[1]) {
			t.Errorf("the document has code that is not in the example:\n%s", block[1])
		}
	}
	rows := readAll(t, filepath.Join("..", "..", "conformance", "rows_*.go"))
	for _, name := range regexp.MustCompile(`\*([a-z]+(?:-[a-z]+)*)\*`).FindAllStringSubmatch(string(text), -1) {
		if !strings.Contains(rows, `"`+name[1]+`"`) {
			t.Errorf("the document names the row %s, which the suite does not have", name[1])
		}
	}
	if lines := strings.Count(readAll(t, "httplock.go"), "\n"); lines >= 200 {
		t.Errorf("the backend has %d lines; the document says that it has less than 200", lines)
	}
}

// readAll returns the files that match, one after the other.
func readAll(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: no files, %v", pattern, err)
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	return all.String()
}
