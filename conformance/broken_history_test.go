package conformance

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// TestLockModel judges histories that were made by hand. Every TTL is 100.
func TestLockModel(t *testing.T) {
	t.Parallel()
	grant := func(id string, call, over int64, token uint64) operation {
		return operation{do: "acquire", id: id, call: call, over: over, known: true, token: token, until: call + 100, ttl: 100}
	}
	held := func(id string, call, over int64) operation {
		return operation{do: "acquire", id: id, call: call, over: over, known: true, held: true, ttl: 100}
	}
	extend := func(id string, call, over int64) operation {
		return operation{do: "extend", id: id, call: call, over: over, known: true, until: call + 100, ttl: 100}
	}
	release := func(id string, call, over int64) operation {
		return operation{do: "release", id: id, call: call, over: over, known: true}
	}
	lost := func(o operation) operation {
		o.lost = true
		return o
	}
	unknown := func(o operation) operation {
		o.known, o.over = false, never
		return o
	}
	for _, c := range []struct {
		name    string
		history []operation
		legal   bool
	}{
		{"one after the other", []operation{grant("a", 0, 1, 1), release("a", 2, 3), grant("b", 4, 5, 2)}, true},
		{"two at once", []operation{grant("a", 0, 1, 1), grant("b", 4, 5, 2)}, false},
		{"granted while it is released", []operation{grant("a", 0, 1, 1), release("a", 2, 6), grant("b", 4, 5, 2)}, true},
		{"granted after the TTL", []operation{grant("a", 0, 1, 1), grant("b", 99, 101, 2)}, true},
		{"granted before the TTL", []operation{grant("a", 0, 1, 1), grant("b", 98, 99, 2)}, false},
		{"granted before the TTL of an extended grant", []operation{grant("a", 0, 1, 1), extend("a", 50, 51), grant("b", 120, 121, 2)}, false},
		{"an extend that may have come", []operation{grant("a", 0, 1, 1), unknown(extend("a", 50, 51)), grant("b", 120, 121, 2)}, true},
		{"the same token again", []operation{grant("a", 0, 1, 1), release("a", 2, 3), grant("b", 4, 5, 1)}, false},
		{"held by nobody", []operation{grant("a", 0, 1, 1), release("a", 2, 3), held("b", 4, 5)}, false},
		{"held by one who may have been granted", []operation{unknown(grant("a", 0, 1, 0)), held("b", 4, 5)}, true},
		{"held by one who is late", []operation{grant("a", 0, 1, 1), held("b", 150, 151), extend("a", 160, 161)}, true},
		{"a release that may have come", []operation{grant("a", 0, 1, 1), unknown(release("a", 2, 3)), grant("b", 4, 5, 2)}, true},
		{"lost before the TTL", []operation{grant("a", 0, 1, 1), lost(extend("a", 50, 51))}, false},
		{"lost after the TTL", []operation{grant("a", 0, 1, 1), lost(extend("a", 150, 151)), grant("b", 152, 153, 2)}, true},
		{"extended when another holds it", []operation{grant("a", 0, 1, 1), grant("b", 110, 111, 2), extend("a", 112, 113)}, false},
		{"released when another holds it", []operation{grant("a", 0, 1, 1), grant("b", 110, 111, 2), release("a", 112, 113)}, false},
		{"a release that says lost", []operation{grant("a", 0, 1, 1), grant("b", 110, 111, 2), lost(release("a", 112, 113)), held("c", 114, 115)}, true},
	} {
		var history []porcupine.Operation
		for i, op := range c.history {
			history = append(history, porcupine.Operation{ClientId: i, Input: op, Call: op.call, Return: op.over})
		}
		if got := porcupine.CheckOperations(lockModel, history); got != c.legal {
			t.Errorf("%s: legal is %t, want %t\n%v", c.name, got, c.legal, c.history)
		}
	}
}
