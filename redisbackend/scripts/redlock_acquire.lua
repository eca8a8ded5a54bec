-- Goes on where redlock_idle.lua has not answered.
local silent, born = quarantine(marker, ARGV[7], now)
if not silent then
  return {now, -3}
elseif silent > 0 then
  return {now, -2, silent}
end
local ends, size = read(state)
local held = ends > now

if belongs(state, me) then
  local before = attempt(state, me)
  if ends == 0 or before > tonumber(ARGV[2]) or not held and before == tonumber(ARGV[2]) then
    return {now, -1} -- released, or a late copy
  end
  if held then
    local head = string.sub(state, #state + 1 - size)
    state = string.sub(state, 1, 67) .. me .. ' ' .. ARGV[4] .. ' ' .. ARGV[2] .. ' ' .. ARGV[5] .. head
    redis.call('SET', KEYS[1], state, 'KEEPTTL')
    prolong(redis.call, state, now + ttl)
    return {now, tonumber(string.sub(state, 1, 16))}
  end
end

local member = me .. ' ' .. ARGV[4]
local head = size > 0 and string.sub(state, -size)
local queue, first
if head == member then
  first = member
elseif head or mode == 'poll' then
  queue = open_queue()
  first = queue.first(now)
end

-- Since when the vote is free.
local since = ends
if ends == 0 then
  since = state and tonumber(string.sub(state, 35, 50)) or now
end

if not held and (not first or first == member or queue.turn(member, now, since)) then
  -- What this server has forgotten was less than its time when it began to remember, and the quarantine, which is longer
  -- than clocks differ. What was left to expire is older than half a day.
  local last = math.max(state and tonumber(string.sub(state, 1, 16)) or now - day * 500000, born + ARGV[7])
  local token = math.max(tonumber(ARGV[2]), last + 1)
  vote(state, size, token, now + ttl, me, ARGV[4], ARGV[2] .. ' ' .. ARGV[5], first and leave(member) or '')
  return {now, token}
end

local position = 0
if mode ~= 'once' then
  queue = queue or open_queue()
  position = queue.enter(member, now, ARGV[8])
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
  return {now, 0, 0, position, '', ''}
end
local id, label = string.match(string.sub(state, 68, -1 - size), '^(%S+) %S+ %d+ (.*)$')
return {now, 0, ends - now, position, id, label}
