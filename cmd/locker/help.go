package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
)

// The texts of this file are printed by help and make docs/command.md, so that both say the same.

const summary = `locker holds a lock while a command runs, and stops the command before somebody else can hold it.`

const overviewExamples = `  locker run -- ./nightly-report.sh                  on this host one at a time, with nothing installed
  LOCKER_URL=redis://db1:6379 locker run -- ./migrate   among all hosts that use this Redis
  locker show                                        who holds what
`

const exitCodes = `  the command's own exit code, or 128 + the signal that killed it
  1    show: nobody holds the lock; check: a promise was broken
  64   what was given is wrong: the command line, the URL, the folder of the locks or a file in it
  69   the lock server cannot be reached, or something else went wrong
  75   run: the lock is held by somebody else, and the wait is over; the command was not started
  76   run: the lock was lost, and the command was stopped or had just ended
  126  run: the command cannot be executed
  127  run: there is no such command
`

func overview() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\nUsage: locker COMMAND [flags] …\n\nCommands:\n", summary)
	for _, c := range commands() {
		fmt.Fprintf(&b, "  %-11s %s\n", c.name, c.short)
	}
	fmt.Fprintf(&b, "  %-11s %s\n", "help", "tell more about a command")
	fmt.Fprintf(&b, "  %-11s %s\n", "--version", "print the version")
	fmt.Fprintf(&b, "\nExamples:\n%s\nExit codes:\n%s", overviewExamples, exitCodes)
	return b.String()
}

// help is the whole text of a command.
func (c *command) help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", strings.TrimRight("Usage: locker "+c.name+" [flags] "+c.args, " "))
	fmt.Fprintf(&b, "%s\n", strings.TrimSpace(c.long))
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	c.define(fs)
	flags := ""
	fs.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		flags += strings.TrimRight(fmt.Sprintf("  --%s %s", f.Name, value), " ") + "\n        " + usage
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0s" && f.DefValue != "0" {
			flags += " (default " + f.DefValue + ")"
		}
		flags += "\n"
	})
	if flags != "" {
		fmt.Fprintf(&b, "\nFlags:\n%s", flags)
	}
	fmt.Fprintf(&b, "\nExamples:\n%s\n", strings.Trim(c.lines, "\n"))
	return b.String()
}

func help(args []string) int {
	if len(args) == 0 {
		fmt.Print(overview())
		return exitOK
	}
	for _, c := range commands() {
		if c.name == args[0] {
			fmt.Print(c.help())
			return exitOK
		}
	}
	return complain("locker", usageError{fmt.Errorf("there is no command %q", args[0])})
}

// document is docs/command.md.
func document() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# The command locker\n\n<!-- Made from the help texts in cmd/locker by make update; edit those. -->\n\n%s\n\n", summary)
	fmt.Fprintf(&b, "```sh\nCGO_ENABLED=0 go install github.com/fec20105/locker/cmd/locker@latest\n```\n\n")
	fmt.Fprintf(&b, "Without cgo it is one static program, which starts faster. For etcd add `-tags etcd`: its client doubles\n"+
		"size and start, so it is left out otherwise.\n\n")
	fmt.Fprintf(&b, "[Operating](operating.md) has it under cron, systemd, Kubernetes and Ansible.\n\n")
	fmt.Fprintf(&b, "```text\n%s```\n", overview())
	for _, c := range commands() {
		fmt.Fprintf(&b, "\n## locker %s\n\n```text\n%s```\n", c.name, c.help())
	}
	return b.String()
}

// version tells which source this is.
func version() string {
	info, ok := debug.ReadBuildInfo()
	v := "unknown"
	if ok && info.Main.Version != "" {
		v = info.Main.Version
	}
	return fmt.Sprintf("locker %s (%s, %s/%s)", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// colours are used on a terminal only, and not where NO_COLOR (https://no-color.org) asks for none.
func colour(f *os.File, code, text string) string {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" || !isTerminal(f) {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// The colours.
const (
	red   = "31"
	green = "32"
	faint = "2"
)
