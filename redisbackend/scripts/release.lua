-- Goes on where release_idle.lua has not answered.
local ends, size = read(state)
local mine, held = belongs(state, me), ends > now
local cleanup = channel and ARGV[3] ~= 'granted'

local done = mine and (held or ends == 0)
local freed = mine and held
if not done then
  local gone = redis.call('GET', KEYS[1] .. ':gone:' .. me)
  if not gone or gone == 'expired' then
    gone = cleanup and 'done' or 'lost'
    overwrite('SET', KEYS[1] .. ':gone:' .. me, gone, 'PX', tombstone)
  end
  done = cleanup or gone == 'done'
end

local head = size > 0 and string.sub(state, -size)
if channel then
  local queue = open_queue()
  leave(me .. ' ' .. channel)
  local first = queue.first(now)
  if state and first ~= head then
    state = string.sub(state, 1, 62) .. tail(state, size, first or '')
    overwrite('SET', KEYS[1], state, 'KEEPTTL')
  end
  head = first
end
if freed then
  overwrite('SETRANGE', KEYS[1], 17, none .. ' ' .. text)
end
-- A waiter that gives up may just have been woken, so the next one is woken in its place.
if head and (freed or not held) then
  wake(head)
end
return done and 1 or 0
