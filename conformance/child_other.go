//go:build !unix

package conformance

// stop skips the row: processes cannot be stopped here.
func (c *child) stop() { c.t.Skipf("this system cannot stop a process") }

func (c *child) resume() {}
