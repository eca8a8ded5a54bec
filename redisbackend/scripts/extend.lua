-- Gives the lock a fresh TTL if the request still holds it.
--
-- KEYS   1 state
-- ARGV   1 id   2 TTL in microseconds
-- Reply  1 extended   0 lost
local state = redis.call('GET', KEYS[1])
local now = clock()
if read(state) <= now or not belongs(state, ARGV[1]) then
  return 0
end
prolong(overwrite, state, now + ARGV[2])
return 1
