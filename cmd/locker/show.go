package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/fec20105/locker"
)

var showCommand = &command{
	name:  "show",
	args:  "[KEY]",
	short: "show who holds what",
	long: `
Lists the locks that are held, or the one that is named: who holds it, since when, until when if it is not renewed, and with
which token. If nobody holds the named lock the exit code is 1.`,
	lines: `
  locker show
  locker show report
  locker show --json | jq -r '.[].key'`,
	define: func(fs *flag.FlagSet) func(context.Context, []string) error {
		url := urlFlag(fs)
		asJSON := fs.Bool("json", false, "print a JSON array")
		return func(ctx context.Context, args []string) error {
			if len(args) > 1 {
				return usageError{errors.New("give one key, or none for all (quote a key with spaces)")}
			}
			l, err := openLocker(ctx, urlOf(*url))
			if err != nil {
				return err
			}
			defer l.Close()
			holdings, err := holdings(ctx, l, args)
			if err != nil {
				return err
			}
			if err := printHoldings(holdings, *asJSON, args); err != nil {
				return err
			}
			if len(args) == 1 && len(holdings) == 0 {
				return exitError(exitNo)
			}
			return nil
		}
	},
}

var breakCommand = &command{
	name:  "break",
	args:  "KEY",
	short: "take a lock away from its holder",
	long: `
Takes a lock away, after asking. The next that waits gets it at once, while the holder may need a moment to learn that it
has lost it: make sure that it has ended, or that what it writes to refuses old tokens.`,
	lines: `
  locker break report
  locker break --yes --url redis://db1:6379 deploy`,
	define: func(fs *flag.FlagSet) func(context.Context, []string) error {
		url := urlFlag(fs)
		yes := fs.Bool("yes", false, "do not ask")
		return func(ctx context.Context, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usageError{errors.New("name the key of one lock, behind the flags")}
			}
			l, err := openLocker(ctx, urlOf(*url))
			if err != nil {
				return err
			}
			defer l.Close()
			return breakLock(ctx, l, args[0], *yes)
		}
	},
}

// holdings asks the backend for what is held, sorted by key.
func holdings(ctx context.Context, l locker.Locker, keys []string) (all []locker.Holding, err error) {
	if len(keys) == 1 {
		h, err := inspect(ctx, l, keys[0])
		if err == nil && h.Token != 0 {
			all = append(all, h)
		}
		return all, err
	}
	lister, ok := locker.As[locker.Lister](l)
	if !ok {
		return nil, errors.New("this backend cannot list its locks: name one")
	}
	for h, err := range lister.List(ctx) {
		if err != nil {
			return nil, err
		}
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b locker.Holding) int { return cmp.Compare(a.Key, b.Key) })
	return slices.CompactFunc(all, func(a, b locker.Holding) bool { return a.Key == b.Key }), nil
}

func inspect(ctx context.Context, l locker.Locker, key string) (locker.Holding, error) {
	inspector, ok := locker.As[locker.Inspector](l)
	if !ok {
		return locker.Holding{}, errors.New("this backend cannot tell who holds a lock")
	}
	return inspector.Inspect(ctx, key)
}

// shown is a holding in JSON.
type shown struct {
	Key     string     `json:"key"`
	Holder  string     `json:"holder"`
	ID      string     `json:"id"`
	Token   uint64     `json:"token"`
	Since   *time.Time `json:"since"` // null where the backend does not know
	Until   *time.Time `json:"until"` // the same
	Waiters *int       `json:"waiters"`
}

func newShown(h locker.Holding, now time.Time) shown {
	s := shown{Key: h.Key, Holder: h.Holder, ID: h.ID, Token: h.Token}
	if !h.Since.IsZero() {
		s.Since = &h.Since
	}
	if h.Remaining > 0 {
		until := now.Add(h.Remaining)
		s.Until = &until
	}
	if h.Waiters >= 0 {
		s.Waiters = &h.Waiters
	}
	return s
}

// printHoldings prints holdings as a table or as JSON.
func printHoldings(holdings []locker.Holding, asJSON bool, keys []string) error {
	now := time.Now()
	all := make([]shown, 0, len(holdings))
	for _, h := range holdings {
		all = append(all, newShown(h, now))
	}
	if asJSON {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		return out.Encode(all)
	}
	if len(all) == 0 {
		if len(keys) == 1 {
			_, err := fmt.Fprintf(os.Stdout, "%s is free\n", plain(keys[0]))
			return err
		}
		_, err := fmt.Fprintln(os.Stdout, "nobody holds a lock")
		return err
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "KEY\tHOLDER\tTOKEN\tSINCE\tUNTIL\tWAITERS")
	for _, s := range all {
		since, until, waiters := "?", "?", "?"
		if s.Since != nil {
			since = s.Since.Local().Format("2006-01-02 15:04:05")
		}
		if s.Until != nil {
			until = fmt.Sprintf("%s (in %v)", s.Until.Local().Format("15:04:05"), s.Until.Sub(now).Round(100*time.Millisecond))
		}
		if s.Waiters != nil {
			waiters = fmt.Sprint(*s.Waiters)
		}
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\t%s\t%s\n", plain(s.Key), plain(s.Holder), s.Token, since, until, waiters)
	}
	return table.Flush()
}

// plain keeps the key or label of a stranger from playing with the terminal.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// breakLock takes a lock away from whoever holds it now, and from nobody else.
func breakLock(ctx context.Context, l locker.Locker, key string, yes bool) error {
	breaker, ok := locker.As[locker.Breaker](l)
	if !ok {
		return errors.New("this backend cannot take locks away")
	}
	h, err := inspect(ctx, l, key)
	if err != nil {
		return err
	}
	if h.Token == 0 {
		fmt.Fprintf(os.Stderr, "locker break: %s is free\n", plain(key))
		return exitError(exitNo)
	}
	who := fmt.Sprintf("%s (held by %s, token %d)", plain(key), plain(h.Holder), h.Token)
	if !yes {
		if !isTerminal(os.Stdin) {
			return usageError{errors.New("nobody can be asked here: give --yes")}
		}
		fmt.Fprintf(os.Stderr, "Take away %s? Its holder may still be at work. [y/N] ", who)
		answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
			fmt.Fprintln(os.Stderr, "left alone")
			return exitError(exitNo)
		}
	}
	if err := breaker.Break(ctx, h); errors.Is(err, locker.ErrLost) {
		fmt.Fprintf(os.Stderr, "locker break: %s has been released meanwhile\n", who)
		return exitError(exitNo)
	} else if err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stdout, "taken away: %s\n", who)
	return err
}
