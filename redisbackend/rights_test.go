package redisbackend_test

import (
	"context"
	"strings"
	"testing"

	"github.com/fec20105/locker"
)

// A user with no more than the rights that the package's documentation names can do everything.
func TestLimitedRights(t *testing.T) {
	t.Parallel()
	server := start(t)
	rights := "user app on >s3cret ~locker:* &locker:* -@all +eval +evalsha +subscribe +publish +ping +info +time +get +mget " +
		"+set +setrange +pexpire +@sortedset +scan"
	args := make([]any, 0, 40)
	args = append(args, "acl", "setuser")
	for right := range strings.FieldsSeq(strings.TrimPrefix(rights, "user ")) {
		args = append(args, right)
	}
	if err := direct(t, server).Do(t.Context(), args...).Err(); err != nil {
		t.Fatal(err)
	}
	l := open(t, "redis://app:s3cret@"+server.Addr)
	req := request("k")
	req.Lost = func(locker.Reason) {}
	lease := acquire(t, l, req)
	if _, err := l.Extend(t.Context(), lease); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	left := request("k")
	waiting := wait(ctx, t, l, left, 1)
	cancel()
	<-waiting
	release(t, l, cleanUp(left))
	next := wait(t.Context(), t, l, request("k"), 1)
	subscribed(t, server.Addr, 1)
	for held, err := range l.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Break(t.Context(), held); err != nil {
			t.Error(err)
		}
	}
	release(t, l, granted(t, next, l.Capabilities().Fallback).lease)
}

// A user without channels could lock and release, until somebody waits. It is told at once.
func TestUserWithoutChannels(t *testing.T) {
	t.Parallel()
	server := start(t)
	args := []any{"acl", "setuser", "app", "on", ">s3cret", "~locker:*", "+@all", "resetchannels"}
	if err := direct(t, server).Do(t.Context(), args...).Err(); err != nil {
		t.Fatal(err)
	}
	l, err := locker.OpenLocker(t.Context(), "redis://app:s3cret@"+server.Addr, locker.Config{})
	if err == nil {
		t.Fatal("opened, although no waiter can be woken", l.Close())
	}
	if !strings.Contains(err.Error(), "lacks rights") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("got %v, want to be told what the user may not do", err)
	}
}
