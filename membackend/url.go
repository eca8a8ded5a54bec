package membackend

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/fec20105/locker"
)

func init() { locker.Register("mem", open) }

var stores sync.Map // of *Store by name

// open makes a client of the store mem://NAME, of which there is one in the process.
func open(_ context.Context, cfg locker.Config) (locker.Locker, error) {
	for param := range cfg.URL.Query() {
		return nil, fmt.Errorf("unknown parameter %q: mem:// has none", param)
	}
	if cfg.URL.Host == "" || cfg.URL.User != nil || cfg.URL.Path != "" {
		return nil, errors.New("the URL must be mem://NAME, with nothing but a name")
	}
	store, _ := stores.LoadOrStore(cfg.URL.Host, NewStore())
	return store.(*Store).Locker(), nil
}
