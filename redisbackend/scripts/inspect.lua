-- Tells who holds the lock.
--
-- KEYS   1 state
-- Reply  {token, remaining, id, label, waiters}   remaining in microseconds; token 0 if nobody holds the lock
local state = redis.call('GET', KEYS[1])
local now = clock()
local ends, size = read(state)
local waiters = redis.call('ZCOUNT', KEYS[1] .. ':seen', now - patience, '+inf')
if (tonumber(redis.call('ZSCORE', KEYS[1] .. ':seen', '')) or 0) >= now - patience then
  waiters = waiters - 1
end
if ends <= now then
  return {0, 0, '', '', waiters}
end
local id, label = string.match(string.sub(state, 68, -1 - size), '^(%S+) %S+ (.*)$')
return {tonumber(string.sub(state, 1, 16)), ends - now, id, label, waiters}
