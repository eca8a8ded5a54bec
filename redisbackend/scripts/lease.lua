-- Writes the state of a lease that begins now, with call: redis.call or overwrite. A state is kept for at least a day after
-- its lease, and its expiry is set anew once in a while only. The day is counted from the token where that is ahead of
-- the clock: when the clock was set back, a token must not be forgotten before the clock has passed it again.
local function lease(call, token, now, ttl, expiry, queue, holder)
  local ends = now + ttl
  local needed = math.max(tonumber(token), ends) / 1000000 + day
  local state = token .. string.format(' %016.0f ', ends)
  if tonumber(expiry) >= needed then
    call('SET', KEYS[1], state .. expiry .. ' ' .. queue .. ' ' .. holder, 'KEEPTTL')
  else
    expiry = string.format('%.0f', needed + day)
    call('SET', KEYS[1], state .. expiry .. ' ' .. queue .. ' ' .. holder, 'EXAT', expiry)
  end
end
