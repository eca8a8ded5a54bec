-- Takes the lock away from the grant with this token, and tells its holder.
--
-- KEYS   1 state
-- ARGV   1 token   2 "id" if it is the grant's id instead
-- Reply  1 done   0 that grant does not hold the lock
local state = redis.call('GET', KEYS[1])
local now, text = clock()
local ends, size = read(state)
if ends <= now then
  return 0
end
local id, channel = string.match(state, '^(%S+) (%S+) ', 68)
if ARGV[2] == 'id' and id ~= ARGV[1] or not ARGV[2] and tonumber(string.sub(state, 1, 16)) ~= tonumber(ARGV[1]) then
  return 0
end
local head = string.sub(state, #state + 1 - size)
-- The tombstone first: while a cluster moves the slot, nothing new can be written here, and then nothing must have been.
overwrite('SET', KEYS[1] .. ':gone:' .. id, 'lost', 'PX', tombstone)
redis.call('SET', KEYS[1], string.sub(state, 1, 17) .. none .. ' ' .. text .. string.sub(state, 51, 67) .. '\127 - ' .. head, 'KEEPTTL')
redis.call('PUBLISH', channel, 'lost ' .. id)
if size > 0 then
  wake(head)
end
return 1
