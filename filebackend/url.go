package filebackend

import (
	"context"
	"errors"

	"github.com/fec20105/locker"
)

func init() { locker.Register("file", fromURL) }

// fromURL makes a Backend from file:///folder, or from file: for the user's own folder.
func fromURL(ctx context.Context, cfg locker.Config) (locker.Locker, error) {
	u := cfg.URL
	switch {
	case u.RawQuery != "" || u.ForceQuery:
		return nil, errors.New("a parameter is unknown: file: has none (write ? in the name of a folder as %3F)")
	case u.Host != "" || u.User != nil:
		return nil, errors.New("the URL must be file:///folder, with three slashes and the full path, or file: for the user's own folder")
	case u.Opaque != "" || u.Fragment != "":
		return nil, errors.New("the URL must be file:///folder with the full path (write # as %23), or file: for the user's own folder")
	}
	b, err := New(ctx, u.Path)
	if err != nil {
		return nil, err
	}
	return b, nil
}
