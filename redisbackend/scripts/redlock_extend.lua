-- Gives a vote a fresh TTL if the request still has it.
--
-- KEYS   1 state
-- ARGV   1 id   2 TTL in microseconds
-- Reply  0 extended   else not: the server's time in microseconds
local state = redis.call('GET', KEYS[1])
local now = clock()
if read(state) <= now or not belongs(state, ARGV[1]) then
  return now
end
prolong(overwrite, state, now + ARGV[2])
return 0
