package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
)

// completionCommand is a function, unlike its siblings, because what it prints names all commands, itself too.
func completionCommand() *command {
	return &command{
		name:  "completion",
		args:  "bash|zsh|fish",
		short: "print a completion script for a shell",
		long:  `Prints a script that teaches a shell the commands and flags of locker.`,
		lines: `
  locker completion bash >/etc/bash_completion.d/locker
  locker completion zsh >"${fpath[1]}/_locker"
  locker completion fish >~/.config/fish/completions/locker.fish`,
		define: func(*flag.FlagSet) func(context.Context, []string) error {
			return func(_ context.Context, args []string) error {
				scripts := map[string]func() string{"bash": bash, "zsh": zsh, "fish": fish}
				if len(args) != 1 || scripts[args[0]] == nil {
					return usageError{errors.New("name a shell: bash, zsh or fish")}
				}
				_, err := fmt.Fprint(os.Stdout, scripts[args[0]]())
				return err
			}
		},
	}
}

// flagsOf are the flags of a command, with their dashes.
func (c *command) flagsOf() (flags []*flag.Flag) {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	c.define(fs)
	fs.VisitAll(func(f *flag.Flag) { flags = append(flags, f) })
	return flags
}

func names() string {
	var all []string
	for _, c := range commands() {
		all = append(all, c.name)
	}
	return strings.Join(all, " ")
}

func bash() string {
	var cases strings.Builder
	for _, c := range commands() {
		var flags []string
		for _, f := range c.flagsOf() {
			flags = append(flags, "--"+f.Name)
		}
		if c.name == "completion" {
			flags = []string{"bash", "zsh", "fish"}
		}
		fmt.Fprintf(&cases, "\t\t%s) words='%s' ;;\n", c.name, strings.Join(append(flags, "--help"), " "))
	}
	// Behind -- stands a command of its own, which is completed like one.
	return `# bash completion for locker
_locker() {
	local i words cur=${COMP_WORDS[COMP_CWORD]}
	COMPREPLY=()
	for ((i = 2; i < COMP_CWORD; i++)); do
		if [[ ${COMP_WORDS[i]} == -- ]]; then
			COMPREPLY=($(compgen -c -- "$cur"))
			((COMP_CWORD > i + 1)) && COMPREPLY=($(compgen -f -- "$cur"))
			return
		fi
	done
	if ((COMP_CWORD == 1)); then
		words='` + names() + ` help --version'
	else
		case ${COMP_WORDS[1]} in
` + cases.String() + `		help) words='` + names() + `' ;;
		esac
	fi
	COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _locker locker
`
}

func zsh() string {
	var b strings.Builder
	fmt.Fprint(&b, `#compdef locker
# zsh completion for locker
_locker() {
	local -a words_of_locker=(
`)
	for _, c := range commands() {
		fmt.Fprintf(&b, "\t\t%s\n", quoted(c.name+":"+c.short))
	}
	fmt.Fprint(&b, `		'help:tell more about a command'
	)
	if ((CURRENT == 2)); then
		_describe command words_of_locker
		return
	fi
	local verb=$words[2]
	shift words
	((CURRENT--))
	case $verb in
`)
	for _, c := range commands() {
		fmt.Fprintf(&b, "\t%s)\n\t\t_arguments -S \\\n", c.name)
		for _, f := range c.flagsOf() {
			value, usage := flag.UnquoteUsage(f)
			// In a description zsh gives brackets and colons a meaning.
			spec := "--" + f.Name + "[" + strings.NewReplacer("[", "(", "]", ")", ":", ";").Replace(usage) + "]"
			if value != "" {
				spec += ":" + strings.ToLower(value) + ":"
			}
			fmt.Fprintf(&b, "\t\t\t%s \\\n", quoted(spec))
		}
		rest := map[string]string{"run": "*:::command:_normal", "completion": "1:shell:(bash zsh fish)"}[c.name]
		if rest == "" {
			rest = "1:" + strings.ToLower(strings.Trim(c.args, "[]")) + ":"
		}
		fmt.Fprintf(&b, "\t\t\t%s\n\t\t;;\n", quoted(rest))
	}
	fmt.Fprint(&b, `	help) _describe command words_of_locker ;;
	esac
}
if [[ $funcstack[1] == _locker ]]; then
	_locker "$@"
else
	compdef _locker locker
fi
`)
	return b.String()
}

// quoted is a word in single quotes, for zsh.
func quoted(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

func fish() string {
	var b strings.Builder
	fmt.Fprintln(&b, "# fish completion for locker\ncomplete -c locker -f")
	for _, c := range commands() {
		fmt.Fprintf(&b, "complete -c locker -n __fish_use_subcommand -a %s -d '%s'\n", c.name, c.short)
		for _, f := range c.flagsOf() {
			value, usage := flag.UnquoteUsage(f)
			requires := ""
			if value != "" {
				requires = " -r"
			}
			fmt.Fprintf(&b, "complete -c locker -n '__fish_seen_subcommand_from %s' -l %s%s -d '%s'\n", c.name, f.Name, requires,
				strings.ReplaceAll(usage, "'", `\'`))
		}
	}
	fmt.Fprintln(&b, "complete -c locker -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'")
	fmt.Fprint(&b, `function __locker_command
	set -l words (commandline -opc) (commandline -ct)
	set -e words[1..(contains -i -- -- $words)]
	complete -C (string join ' ' -- (string escape -- $words[..-2]) $words[-1])
end
complete -c locker -n 'contains -- -- (commandline -opc)' -a '(__locker_command)'
`)
	return b.String()
}
