package membackend

import (
	"context"
	"errors"
	"sync"

	"github.com/fec20105/locker"
)

func init() { locker.Register("mem", open) }

var stores sync.Map // of *Store by name

// open makes a client of the store mem://NAME, of which there is one in the process.
func open(_ context.Context, cfg locker.Config) (locker.Locker, error) {
	if cfg.URL.RawQuery != "" {
		return nil, errors.New("a parameter is unknown: mem:// has none")
	}
	if cfg.URL.Host == "" || cfg.URL.User != nil || cfg.URL.Path != "" {
		return nil, errors.New("the URL must be mem://NAME, with nothing but a name")
	}
	store, _ := stores.LoadOrStore(cfg.URL.Host, NewStore())
	return store.(*Store).Locker(), nil
}
