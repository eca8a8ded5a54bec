package redisbackend

import (
	"crypto/sha1" //nolint:gosec // Redis names its scripts by SHA-1.
	_ "embed"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Every step on a lock is one script, so that it happens as a whole or not at all. Each stands in a file of its own
// whose header names its KEYS, ARGV and reply; what they share is put in front of them here.
var (
	//go:embed scripts/clock.lua
	clockLua string
	//go:embed scripts/prelude.lua
	preludeLua string
	//go:embed scripts/lease.lua
	leaseLua string
	//go:embed scripts/overwrite.lua
	overwriteLua string
	//go:embed scripts/queue.lua
	queueLua string
	//go:embed scripts/acquire_idle.lua
	acquireIdleLua string
	//go:embed scripts/acquire.lua
	acquireLua string
	//go:embed scripts/extend.lua
	extendLua string
	//go:embed scripts/release_idle.lua
	releaseIdleLua string
	//go:embed scripts/release.lua
	releaseLua string
	//go:embed scripts/break.lua
	breakLua string
	//go:embed scripts/inspect.lua
	inspectLua string
	//go:embed scripts/forget.lua
	forgetLua string
	//go:embed scripts/guard.lua
	guardLua string

	//go:embed scripts/redlock.lua
	redlockLua string
	//go:embed scripts/redlock_birth.lua
	redlockBirthLua string
	//go:embed scripts/redlock_idle.lua
	redlockIdleLua string
	//go:embed scripts/redlock_acquire.lua
	redlockAcquireLua string
	//go:embed scripts/redlock_raise.lua
	redlockRaiseLua string
	//go:embed scripts/redlock_extend.lua
	redlockExtendLua string
	//go:embed scripts/redlock_repair.lua
	redlockRepairLua string
	//go:embed scripts/redlock_yield.lua
	redlockYieldLua string

	acquireScript = newScript(acquireIdleLua, preludeLua, leaseLua, queueLua, acquireLua)
	extendScript  = newScript(preludeLua, clockLua, overwriteLua, leaseLua, extendLua)
	releaseScript = newScript(releaseIdleLua, preludeLua, overwriteLua, queueLua, releaseLua)
	breakScript   = newScript(preludeLua, clockLua, overwriteLua, queueLua, breakLua)
	inspectScript = newScript(preludeLua, clockLua, inspectLua)
	forgetScript  = newScript(preludeLua, clockLua, forgetLua)
	guardScript   = redis.NewScript(guardLua)

	// Redlock releases, breaks and inspects the votes of each server with the scripts of a lock on one server.
	redlockBirthScript   = newScript(preludeLua, clockLua, redlockBirthLua)
	redlockAcquireScript = newScript(redlockIdleLua, preludeLua, leaseLua, queueLua, redlockLua, redlockAcquireLua)
	redlockRaiseScript   = newScript(preludeLua, clockLua, leaseLua, redlockRaiseLua)
	redlockExtendScript  = newScript(preludeLua, clockLua, overwriteLua, leaseLua, redlockExtendLua)
	redlockRepairScript  = newScript(preludeLua, clockLua, leaseLua, queueLua, redlockLua, redlockRepairLua)
	redlockYieldScript   = newScript(preludeLua, clockLua, leaseLua, queueLua, redlockLua, redlockYieldLua)
)

// script is the source of a script and the name that the server gives it.
type script struct{ source, sha string }

func newScript(parts ...string) script {
	source := fmt.Sprintf("local patience, grace = %d, %d -- in microseconds\nlocal tombstone = %d -- in milliseconds\n"+
		"local day = 86400 -- in seconds\nlocal none = '0000000000000000'\n",
		patience.Microseconds(), grace.Microseconds(), tombstoneLife.Milliseconds())
	source += strings.Join(parts, "")
	sum := sha1.Sum([]byte(source)) //nolint:gosec // See above.
	return script{source: source, sha: hex.EncodeToString(sum[:])}
}

// escapeName keeps braces out of a hash tag. The percent sign is escaped too, so that no two locks get one name.
var (
	escapeName   = strings.NewReplacer("%", "%25", "{", "%7B", "}", "%7D")
	unescapeName = strings.NewReplacer("%25", "%", "%7B", "{", "%7D", "}")
)

// stateKey names the state of a lock. The lock's own name stands in braces, the hash tag by which a cluster keeps all
// that belongs to it in one slot.
func stateKey(prefix, key string) string { return prefix + "{" + escapeName.Replace(key) + "}" }

// nameOf is the inverse of stateKey. It answers false for a key that is not a lock's state.
func nameOf(prefix, state string) (key string, ok bool) {
	name, ok := strings.CutPrefix(state, prefix+"{")
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, "}")
	if !ok || strings.ContainsAny(name, "{}") {
		return "", false
	}
	return unescapeName.Replace(name), true
}
