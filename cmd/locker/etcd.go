//go:build etcd

package main

// The client of etcd makes the program 2.6 times as large, and doubles the time that every locker run takes to start.
// Those who have etcd want it, and build with -tags etcd.
import _ "github.com/fec20105/locker/etcdbackend"
