package main

import "syscall"

// dieWithParent has the kernel kill the command when we are killed.
func dieWithParent(a *syscall.SysProcAttr) { a.Pdeathsig = syscall.SIGKILL }
