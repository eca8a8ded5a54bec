-- Gives a vote back that was not enough for a grant, without giving up the request. One that waits enters the queue again,
-- at its old place.
--
-- KEYS   1 state
-- ARGV   1 id   2 attempt: a later one is left alone   3 channel   4 when the request began to wait
--        5 "once" if it does not wait
-- Reply  1 done   0 there was no such vote
local state = redis.call('GET', KEYS[1])
local now, text = clock()
local ends, size = read(state)
if ends <= now or not belongs(state, ARGV[1]) or attempt(state, ARGV[1]) > tonumber(ARGV[2]) then
  return 0
end
local member, head = ARGV[1] .. ' ' .. ARGV[3], string.sub(state, #state + 1 - size)
if ARGV[5] ~= 'once' then
  local queue = open_queue()
  queue.enter(member, now, ARGV[4])
  head = queue.first(now)
end
state = string.sub(state, 1, 17) .. none .. ' ' .. text .. string.sub(state, 51, 62) .. string.format('%04d ', #head) .. '\127 - ' .. head
redis.call('SET', KEYS[1], state, 'KEEPTTL')
if head ~= '' and head ~= member then
  wake(head)
end
return 1
