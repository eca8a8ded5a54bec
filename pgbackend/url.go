package pgbackend

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fec20105/locker"
)

func init() {
	locker.Register("postgres", open)
	locker.Register("postgresql", open)
}

// open makes a Backend from a URL as PostgreSQL's own clients take it, with parameters of our own:
//
//	postgres://user:password@host:5432/database?sslmode=verify-full&prefix=app:&waiters=8
//	postgres://h1,h2:5433/database?target_session_attrs=read-write
//	postgres:///database?host=/run/postgresql
func open(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	settings, opts, err := fromURL(cfg)
	if err != nil {
		return nil, &locker.Error{Op: "open", Backend: name, Err: err}
	}
	opts.Logger = cfg.Logger
	b, err := newBackend(ctx, settings, opts)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// passed are the parameters that are PostgreSQL's own.
var passed = []string{
	"application_name", "channel_binding", "connect_timeout", "host", "passfile", "port", "service", "servicefile",
	"sslcert", "sslkey", "sslmode", "sslnegotiation", "sslpassword", "sslrootcert", "sslsni", "target_session_attrs",
}

// fromURL reads the settings. No error repeats what may be a password.
func fromURL(cfg locker.Config) (*pgconn.Config, Options, error) {
	var opts Options
	own := map[string]func(string) error{
		"prefix":   text(&opts.Prefix),
		"sequence": text(&opts.Sequence),
		"waiters":  number(&opts.Waiters, 1),
		"ddl":      forbidden(&opts.WithoutDDL),
	}
	settings := map[string]string{}
	for param, values := range cfg.URL.Query() {
		read, ours := own[param]
		if !ours && !slices.Contains(passed, param) {
			known := slices.Clone(passed)
			for name := range own {
				known = append(known, name)
			}
			slices.Sort(known)
			// Its name is not told: it may be the rest of a password with an "&".
			return nil, opts, fmt.Errorf("a parameter is unknown: known are %s", strings.Join(known, ", "))
		}
		if len(values) != 1 {
			return nil, opts, fmt.Errorf("the parameter %s is given %d times", param, len(values))
		}
		if !ours {
			settings[param] = values[0]
		} else if err := read(values[0]); err != nil {
			return nil, opts, fmt.Errorf("the parameter %s %w", param, err)
		}
	}
	if user := cfg.URL.User.Username(); user != "" {
		settings["user"] = user
	}
	if password, ok := cfg.URL.User.Password(); ok {
		settings["password"] = password
	}
	if database := strings.Trim(cfg.URL.Path, "/"); database != "" {
		settings["dbname"] = database
	}
	if err := hosts(cfg.URL, settings); err != nil {
		return nil, opts, err
	}
	config, err := pgconn.ParseConfig(dsn(settings))
	if err != nil {
		// Its own text repeats the settings, and may repeat the password.
		if cause := errors.Unwrap(err); cause != nil {
			return nil, opts, fmt.Errorf("the settings are bad: %w", cause)
		}
		return nil, opts, errors.New("the settings are bad: check the values of the URL's parameters")
	}
	if cfg.Dial != nil {
		config.DialFunc = cfg.Dial
		config.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil } // the dialer's business
	}
	return config, opts, nil
}

// hosts adds what the URL says of servers. With several of them one that can be written to is looked for.
func hosts(u *url.URL, settings map[string]string) error {
	if u.Host == "" {
		return nil
	}
	if settings["host"] != "" || settings["port"] != "" {
		return errors.New("the URL names a server twice: give it as host or as parameters host and port")
	}
	var names, ports []string
	for host := range strings.SplitSeq(u.Host, ",") {
		one := url.URL{Host: host}
		name, port := one.Hostname(), one.Port()
		if name == "" {
			name = "localhost"
		}
		if port == "" {
			port = "5432"
		}
		names, ports = append(names, name), append(ports, port)
	}
	settings["host"], settings["port"] = strings.Join(names, ","), strings.Join(ports, ",")
	if len(names) > 1 && settings["target_session_attrs"] == "" {
		settings["target_session_attrs"] = "read-write"
	}
	return nil
}

// dsn writes settings in libpq's other form, in which hosts and passwords need no care.
func dsn(settings map[string]string) string {
	pairs := make([]string, 0, len(settings))
	for name, value := range settings {
		pairs = append(pairs, name+"='"+strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value)+"'")
	}
	return strings.Join(pairs, " ")
}

func text(to *string) func(string) error {
	return func(value string) error {
		*to = value
		return nil
	}
}

func number(to *int, least int) func(string) error {
	return func(value string) error {
		n, err := strconv.Atoi(value)
		if err != nil || n < least {
			return fmt.Errorf("must be a number from %d", least)
		}
		*to = n
		return nil
	}
}

func forbidden(to *bool) func(string) error {
	return func(value string) error {
		if value != "true" && value != "false" {
			return errors.New("must be true or false")
		}
		*to = value == "false"
		return nil
	}
}
