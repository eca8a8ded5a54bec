-- Takes the lock away from the grant with this token, and tells its holder.
--
-- KEYS   1 state
-- ARGV   1 token
-- Reply  1 done   0 that grant does not hold the lock
local state = redis.call('GET', KEYS[1])
local now, text = clock()
local token, ends, expiry = read(state)
if ends <= now or tonumber(token) ~= tonumber(ARGV[1]) then
  return 0
end
local id, channel = string.match(rest(state), '^(%S+) (%S+) ')
local queue = open_queue()
local first = queue.first(now)
overwrite('SET', KEYS[1], token .. ' ' .. released .. ' ' .. expiry .. (first and ' 1 ' or ' 0 ') .. ' ' .. text, 'KEEPTTL')
redis.call('SET', KEYS[1] .. ':gone:' .. id, 'lost', 'PX', tombstone)
redis.call('PUBLISH', channel, 'lost ' .. id)
if first then
  queue.wake(first)
end
return 1
