-- Gives this server's vote to a request, or tells who has it. A request that waits enters the queue, and asks with this
-- script again.
--
-- KEYS   1 state
-- ARGV   1 id   2 attempt, which is also the token that is proposed   3 TTL in microseconds   4 channel   5 label
--        6 marker   7 quarantine in microseconds   8 when the request began to wait, by the servers' time
--        9 "once" does not wait, "poll" has been told to wait; missing: is ready to wait
-- Reply  {time, token}                               the vote; its token is the proposed one or a greater one
--        {time, 0, remaining, position, id, label}   somebody else has it, or, with an empty id, is before
--        {time, -1}                                  the request has been released or withdrawn
--        {time, -2, remaining}                       the server may have forgotten votes, and stays out for so long
--        {time, -3}                                  the server knows nothing, not even since when
local me, ttl, mode = ARGV[1], ARGV[3], ARGV[9]
local sub, call = string.sub, redis.call
local found = call('MGET', KEYS[1], KEYS[1] .. ':gone:' .. me, ARGV[6])
local state, marker = found[1], found[3]
local time = call('TIME')
local text = time[1] .. sub('00000' .. time[2], -6)
local now = tonumber(text)
if found[2] then
  return {now, -1}
end

-- Another request has released the lock, nobody waits, the server remembers everything, the proposed token is greater than
-- all that it has accepted, and the state is kept for long enough.
if mode ~= 'poll' and state and marker and sub(state, 18, 33) == none and sub(state, 62, 67) == ' 0000 ' and sub(state, 1, 16) < ARGV[2] then
  local token, ends, remembers = tonumber(ARGV[2]), now + ttl, (tonumber(sub(marker, -16)) or now) + ARGV[7]
  local expiry, covers = string.format('%016d', ends), sub(state, 52, 61)
  local last, space = sub(state, 68, 67 + #me), sub(state, 68 + #me, 68 + #me)
  if remembers <= now and remembers < token and token < ends and sub(expiry, 1, 10) < covers and space == ' ' and last ~= me
    and expiry > text then -- not where the server was built for 32 bits
    call('SET', KEYS[1] .. ':gone:' .. last, 'done', 'PX', tombstone)
    call('SET', KEYS[1], ARGV[2] .. ' ' .. expiry .. ' ' .. none .. ' ' .. covers .. ' 0000 ' .. me .. ' ' .. ARGV[4] .. ' ' .. ARGV[2] .. ' ' .. ARGV[5], 'KEEPTTL')
    return {now, token}
  end
end
