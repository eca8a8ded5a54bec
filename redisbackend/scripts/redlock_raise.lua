-- Writes back the token that a grant was given by its greatest vote.
--
-- KEYS   1 state
-- ARGV   1 id   2 token
-- Reply  the token that this vote has now: that one, or a greater one that was written back later   0 the vote is not the request's
local state = redis.call('GET', KEYS[1])
local ends, size = read(state)
if ends <= clock() or not belongs(state, ARGV[1]) then
  return 0
end
local token = tonumber(string.sub(state, 1, 16))
if token < tonumber(ARGV[2]) then
  token = tonumber(ARGV[2])
  state = string.format('%016.0f', token) .. string.sub(state, 17)
  redis.call('SET', KEYS[1], state, 'KEEPTTL')
  prolong(redis.call, state, ends) -- keeps it for longer if need be
end
return token
