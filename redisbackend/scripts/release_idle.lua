-- Frees the lock if the request holds it. A repeated release is answered like the first, and an acquire of this request
-- that lands later is refused.
--
-- KEYS   1 state
-- ARGV   1 id   2 only for a clean-up, which also takes the request out of the queue: channel
--        3 "granted" if it is no clean-up: in Redlock a granted request may stand in the queues of some servers
-- Reply  1 done   0 lost
local me, channel = ARGV[1], ARGV[2]
local state = redis.call('GET', KEYS[1])
local time = redis.call('TIME')
local text = time[1] .. string.sub('00000' .. time[2], -6)

-- The request holds the lock, and nobody waits. Without memory for it the rest of the script tries again.
if not channel and state and string.sub(state, 18, 33) > text and string.sub(state, 62, 68 + #me) == ' 0000 ' .. me .. ' ' then
  if redis.pcall('SETRANGE', KEYS[1], 17, none .. ' ' .. text) == #state then
    return 1
  end
end
local now = tonumber(text)
