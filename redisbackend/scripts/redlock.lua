-- Shared by the scripts of Redlock, behind the prelude. A state is that of the prelude, with one field more in front of the
-- label: the attempt by which the request got its vote, 16 digits. A request may try again, and a late withdrawal of an
-- earlier attempt must not undo a later one.

-- How long the server stays out of votes, or nil if it cannot tell, and since when it remembers everything.
local function quarantine(marker, time, now)
  local born = tonumber(string.match(marker or '', '(%d+)$'))
  return born and math.max(born + time - now, 0), born
end

-- The attempt by which the request got its vote, if the vote is its.
local function attempt(state, id)
  return tonumber(string.match(state, '^%S+ (%d+)', 69 + #id))
end

-- Makes the state of a vote, in place of the one before.
local function vote(state, size, token, ends, id, channel, label, head)
  local covers = state and string.sub(state, 52, 61) or '0'
  local last = state and string.match(state, '^%S+', 68) or '\127'
  local new
  if last ~= '\127' and last ~= id then
    -- No late copy of the last holder's requests may get a vote. If it has not released, most servers may know it still:
    -- this one was down for a while, and a repair must be possible.
    redis.call('SET', KEYS[1] .. ':gone:' .. last, tonumber(string.sub(state, 18, 33)) > 0 and 'expired' or 'done', 'PX', tombstone)
  end
  token = string.format('%016.0f', token)
  covers, new = cover(token, ends, covers)
  state = token .. string.format(' %016.0f ', ends) .. none .. ' ' .. covers .. string.format(' %04d ', #head) .. id .. ' ' .. channel .. ' ' .. label .. head
  if new then
    redis.call('SET', KEYS[1], state, 'EXAT', covers + day)
  else
    redis.call('SET', KEYS[1], state, 'KEEPTTL')
  end
end
