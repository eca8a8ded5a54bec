-- Forgets a lock with its last token soon, unless somebody holds it or waits for it.
--
-- KEYS   1 state
-- Reply  1 nothing will be known of the lock   0 it is in use
local state = redis.call('GET', KEYS[1])
local now = clock()
local ends = read(state)
if ends > now or redis.call('ZCOUNT', KEYS[1] .. ':seen', now - patience, '+inf') > 0 then
  return 0
end
redis.call('DEL', KEYS[1] .. ':order', KEYS[1] .. ':seen')
-- The state itself goes when late copies of the last holder's requests are refused no more, and when the clock is past its
-- token. Its expiry is to be made anew by the next grant.
if state then
  local ahead = math.max(tonumber(string.sub(state, 1, 16)) - now, 0) / 1000
  redis.call('SET', KEYS[1], string.sub(state, 1, 51) .. '0000000000' .. string.sub(state, 62), 'PX', string.format('%.0f', tombstone + ahead))
end
return 1
