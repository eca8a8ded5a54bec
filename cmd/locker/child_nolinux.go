//go:build unix && !linux

package main

import "syscall"

// dieWithParent: these systems have no parent-death signal; the guard kills the command.
func dieWithParent(*syscall.SysProcAttr) {}
