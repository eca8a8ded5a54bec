package httplock

import (
	"context"
	"errors"
	"net"

	"github.com/fec20105/locker"
)

func init() { locker.Register("httplock", fromURL) }

// fromURL makes a Backend from httplock://host:port.
func fromURL(_ context.Context, cfg locker.Config) (locker.Locker, error) {
	if cfg.URL.RawQuery != "" {
		return nil, errors.New("a parameter is unknown: httplock:// has none")
	}
	_, port, err := net.SplitHostPort(cfg.URL.Host)
	if err != nil || port == "" || cfg.URL.User != nil || cfg.URL.Path != "" {
		return nil, errors.New("the URL must be httplock://host:port, and nothing more")
	}
	return New(cfg.URL.Host, cfg.Dial), nil
}
