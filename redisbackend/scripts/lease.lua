-- Until when leases may end without a new expiry of the state, and whether that is new. The state is forgotten a day
-- later, and the expiry is set anew once in a while only. The day is counted from the token where that is ahead of the
-- clock: when the clock was set back, a token must not be forgotten before the clock has passed it again.
local function cover(token, ends, covers)
  local needed = math.max(tonumber(token), ends) / 1000000
  if tonumber(covers) >= needed then
    return covers, false
  end
  return string.format('%010.0f', needed + day), true
end

-- Gives a lease a fresh TTL, with call: redis.call or overwrite.
local function prolong(call, state, ends)
  local covers, new = cover(string.sub(state, 1, 16), ends, string.sub(state, 52, 61))
  if new then
    state = string.sub(state, 1, 17) .. string.format('%016.0f', ends) .. string.sub(state, 34, 51) .. covers .. string.sub(state, 62)
    call('SET', KEYS[1], state, 'EXAT', covers + day)
  else
    call('SETRANGE', KEYS[1], 17, string.format('%016.0f', ends))
  end
end
