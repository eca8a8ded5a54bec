-- Gives the lock a fresh TTL if the request still holds it.
--
-- KEYS   1 state
-- ARGV   1 id   2 TTL in microseconds
-- Reply  1 extended   0 lost
local state = redis.call('GET', KEYS[1])
local now = clock()
local token, ends, expiry, waited = read(state)
if ends <= now or not holds(state, ARGV[1]) then
  return 0
end
lease(overwrite, token, now, ARGV[2], expiry, waited, rest(state))
return 1
