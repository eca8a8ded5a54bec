package main

import (
	"regexp"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), "mem://longjob-test", &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`3\.\ds  second:   locker: "job" is held by "the first" for another`,
		`3\.\ds  first:    stops working: locker: lock "job" \(token \d+\) lost: taken`,
		`first:    undoes what it did under token \d+`,
		`second:   holds the lock with token \d+`,
	} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("no line matches %q in:\n%s", want, out.String())
		}
	}
}
