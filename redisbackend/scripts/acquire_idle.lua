-- Grants the lock to a request, or tells who holds it. A request that waits enters the queue, and polls with this
-- script again.
--
-- KEYS   1 state
-- ARGV   1 id   2 TTL in microseconds   3 channel   4 label
--        5 the last holder, if its Locker asks here and knows that no request of it is still on its way, else ""
--        6 "once" does not wait, "poll" has been told to wait; missing: is ready to wait
-- Reply  token                          granted; the same grant again for a request that holds the lock
--        {remaining, label, position, new}   held; remaining in microseconds. If it is 0, the lock is free, and others
--                                       are before. new is 1 if the request did not stand in the queue before
--        -1                             the request has been released or withdrawn
local me, ttl = ARGV[1], ARGV[2]
local state = redis.call('GET', KEYS[1])
if redis.call('GET', KEYS[1] .. ':gone:' .. me) then
  return -1
end
local time = redis.call('TIME')
local text = time[1] .. string.sub('00000' .. time[2], -6)
local now = tonumber(text)

-- The lock is new; or it was released, nobody waits, and no request of the last holder is on its way.
if ARGV[6] ~= 'poll' and ARGV[5] ~= me and (not state or string.sub(state, 1, 16) < text and string.sub(state, 18, 33) == none
  and string.sub(state, 62, 68 + #ARGV[5]) == ' 0000 ' .. ARGV[5] .. ' ') then
  local ends = string.format('%016d', now + ttl)
  if ends > text then -- not where the server was built for 32 bits
    local covers, new = state and string.sub(state, 52, 61) or '', false
    if covers < string.sub(ends, 1, 10) then
      covers, new = string.format('%010d', string.sub(ends, 1, 10) + day), true
    end
    state = text .. ' ' .. ends .. ' ' .. none .. ' ' .. covers .. ' 0000 ' .. me .. ' ' .. ARGV[3] .. ' ' .. ARGV[4]
    if new then
      redis.call('SET', KEYS[1], state, 'EXAT', covers + day)
    else
      redis.call('SET', KEYS[1], state, 'KEEPTTL')
    end
    return now
  end
end
