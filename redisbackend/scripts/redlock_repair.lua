-- Gives a vote to a request that most servers have just extended, and that this one did not know: for no longer than theirs
-- last, so that nobody else can have been granted the lock meanwhile. If it comes too late nothing happens.
--
-- KEYS   1 state
-- ARGV   1 id   2 until, by this server's time   3 channel   4 label with attempt   5 token   6 marker   7 quarantine in microseconds
-- Reply  1 done   0 not
local found = redis.call('MGET', KEYS[1], KEYS[1] .. ':gone:' .. ARGV[1], ARGV[6])
local state = found[1]
local now = clock()
local ends, size = read(state)
local over = found[2] and found[2] ~= 'expired'
if over or ends > now or tonumber(ARGV[2]) <= now or quarantine(found[3], ARGV[7], now) ~= 0 then
  return 0
end
if state and ends == 0 and belongs(state, ARGV[1]) then
  return 0 -- released
end
-- Others may have been refused since, with greater tokens: this server goes on from those.
local token = math.max(tonumber(ARGV[5]), state and tonumber(string.sub(state, 1, 16)) or 0)
vote(state, size, token, tonumber(ARGV[2]), ARGV[1], ARGV[3], ARGV[4], leave(ARGV[1] .. ' ' .. ARGV[3]) or '')
return 1
