-- Forgets a lock with its last token, unless somebody holds it or waits for it.
--
-- KEYS   1 state
-- Reply  1 nothing is known of the lock now   0 it is in use
local state = redis.call('GET', KEYS[1])
local now = clock()
local ends = read(state)
if ends > now or redis.call('ZCOUNT', KEYS[1] .. ':seen', now - patience, '+inf') > 0 then
  return 0
end
redis.call('DEL', KEYS[1] .. ':order', KEYS[1] .. ':seen')
-- No late copy of the last holder's requests may be granted.
local last = state and string.match(state, '^%S+', 68) or '\127'
if last ~= '\127' then
  redis.call('SET', KEYS[1] .. ':gone:' .. last, ends > 0 and 'lost' or 'done', 'PX', tombstone)
end
redis.call('DEL', KEYS[1])
return 1
