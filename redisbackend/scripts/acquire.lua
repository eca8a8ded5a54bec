-- Grants the lock to a request, or tells who holds it. A request that waits enters the queue, and polls with this
-- script again.
--
-- KEYS   1 state
-- ARGV   1 id   2 TTL in microseconds   3 channel   4 label
--        5 the last holder, if its Locker asks here and knows that no request of it is still on its way, else ""
--        6 "once" does not wait, "poll" has been told to wait; missing: is ready to wait
-- Reply  token                          granted; the same grant again for a request that holds the lock
--        {remaining, label, position}   held; remaining in microseconds. If it is 0, the lock is free, and others are before
--        -1                             the request has been released or withdrawn
local me, ttl, mode = ARGV[1], ARGV[2], ARGV[6]
local found = redis.call('MGET', KEYS[1], KEYS[1] .. ':gone:' .. me)
local state = found[1]
if found[2] then
  return -1
end
local now, text = clock()
local token, ends, expiry, waited = read(state)

if ends > now and holds(state, me) then
  lease(redis.call, token, now, ttl, expiry, waited, rest(state))
  return tonumber(token)
end

-- Since when the lock is free, and whose tombstone may still be needed.
local since, last = state and ends or now
if state and ends == 0 then
  since, last = tonumber(string.sub(state, -16)), string.sub(state, 48, -18)
  if last == me then
    return -1
  elseif last == ARGV[5] or now - since > tombstone * 1000 then
    last = ''
  end
end

-- The same for a lease that has expired: no late copy of its request may be granted again.
local fate = 'done'
if state and ends > 0 and ends <= now then
  if holds(state, me) then
    return -1
  elseif now - ends <= tombstone * 1000 then
    last, fate = string.match(rest(state), '^%S+'), 'lost'
  end
end

-- A request that was told to wait stands in the queue, even if the state that says so was deleted meanwhile.
local member = me .. ' ' .. ARGV[3]
local queue, first
if waited == '1' or mode == 'poll' then
  queue = open_queue()
  first = queue.first(now)
end

if ends <= now and (not first or first == member or queue.turn(member, now, since)) then
  if tonumber(token) < now then
    token = text
  else
    token = string.format('%016.0f', token + 1)
  end
  lease(redis.call, token, now, ttl, expiry, first and '1' or '0', member .. ' ' .. ARGV[4])
  if last and last ~= '' then
    redis.call('SET', KEYS[1] .. ':gone:' .. last, fate, 'PX', tombstone)
  end
  if first then
    queue.leave(member)
  end
  return tonumber(token)
end

local position = 0
if mode ~= 'once' then
  position = (queue or open_queue()).enter(member, now)
  if waited == '0' and state then
    redis.call('SETRANGE', KEYS[1], 45, '1')
  end
end
if ends <= now then
  return {0, '', position}
end
return {ends - now, string.match(rest(state), '^%S+ %S+ (.*)$'), position}
