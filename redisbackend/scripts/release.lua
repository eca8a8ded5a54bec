-- Frees the lock if the request holds it. A repeated release is answered like the first, and an acquire of this request
-- that lands later is refused.
--
-- KEYS   1 state
-- ARGV   1 id   2 only for a clean-up, which also takes the request out of the queue: channel
-- Reply  1 done   0 lost
local me, channel = ARGV[1], ARGV[2]
local state = redis.call('GET', KEYS[1])
local now, text = clock()
local token, ends, expiry, waited = read(state)
local mine = ends > now and holds(state, me)

local gone
if not mine then
  gone = redis.call('GET', KEYS[1] .. ':gone:' .. me)
  if not gone and state and ends == 0 and string.sub(state, 48, -18) == me then
    gone = 'done'
  end
  if not gone then
    gone = channel and 'done' or 'lost'
    overwrite('SET', KEYS[1] .. ':gone:' .. me, gone, 'PX', tombstone)
  end
end

local queue, first
if channel or waited == '1' then
  queue = open_queue()
  if channel then
    queue.leave(me .. ' ' .. channel)
  end
  first = queue.first(now)
end
if mine then
  overwrite('SET', KEYS[1], token .. ' ' .. released .. ' ' .. expiry .. (first and ' 1 ' or ' 0 ') .. me .. ' ' .. text, 'KEEPTTL')
end
-- A waiter that gives up may just have been woken, so the next one is woken in its place.
if first and (mine or ends <= now) then
  queue.wake(first)
end
return (mine or channel or gone == 'done') and 1 or 0
