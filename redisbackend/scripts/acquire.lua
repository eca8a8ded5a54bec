-- Goes on where acquire_idle.lua has not answered.
local mode = ARGV[6]
local ends, size = read(state)
local held = ends > now

if belongs(state, me) then
  if not held then
    return -1 -- a late copy
  end
  prolong(redis.call, state, now + ttl)
  return tonumber(string.sub(state, 1, 16))
end

-- The head of the queue needs no look at the others. A request that was told to wait stands in the queue, even if the
-- state that says so was deleted meanwhile.
local member = me .. ' ' .. ARGV[3]
local head = size > 0 and string.sub(state, -size)
local queue, first
if head == member then
  first = member
elseif head or mode == 'poll' then
  queue = open_queue()
  first = queue.first(now)
end

-- Since when the lock is free.
local since = ends
if ends == 0 then
  since = state and tonumber(string.sub(state, 35, 50)) or now
end

if not held and (not first or first == member or queue.turn(member, now, since)) then
  local token, covers = none, '0'
  if state then
    token, covers = string.sub(state, 1, 16), string.sub(state, 52, 61)
    -- No late copy of the last holder's requests may be granted.
    local last = string.match(state, '^%S+', 68)
    if last ~= '\127' and (last ~= ARGV[5] or ends > 0) and now - since <= tombstone * 1000 then
      redis.call('SET', KEYS[1] .. ':gone:' .. last, ends > 0 and 'lost' or 'done', 'PX', tombstone)
    end
  end
  if tonumber(token) < now then
    token = text
  else
    token = string.format('%016.0f', token + 1)
  end
  local next = first and leave(member) or ''
  ends = now + ttl
  local covers, new = cover(token, ends, covers)
  state = token .. string.format(' %016.0f ', ends) .. none .. ' ' .. covers .. string.format(' %04d ', #next) .. member .. ' ' .. ARGV[4] .. next
  if new then
    redis.call('SET', KEYS[1], state, 'EXAT', covers + day)
  else
    redis.call('SET', KEYS[1], state, 'KEEPTTL')
  end
  return tonumber(token)
end

local position, new = 0, 0
if mode ~= 'once' then
  queue = queue or open_queue()
  position, new = queue.enter(member, now)
  if position == 1 then
    first = member
  elseif not first or first == member then
    first = queue.first(now)
  end
  if state and first ~= head then
    redis.call('SET', KEYS[1], string.sub(state, 1, 62) .. tail(state, size, first), 'KEEPTTL')
  end
end
if not held then
  return {0, '', position, new}
end
return {ends - now, string.match(string.sub(state, 68, -1 - size), '^%S+ %S+ (.*)$'), position, new}
