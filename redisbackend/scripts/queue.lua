-- The queue. Whoever has not polled for a while is dead, and is dropped before anybody looks.
local order, seen = KEYS[1] .. ':order', KEYS[1] .. ':seen'

local function first_waiter(now)
  repeat
    local dead = redis.call('ZRANGEBYSCORE', seen, '-inf', now - patience, 'LIMIT', 0, 1000)
    if #dead > 0 then
      redis.call('ZREM', order, unpack(dead))
      redis.call('ZREM', seen, unpack(dead))
    end
  until #dead < 1000
  return redis.call('ZRANGE', order, 0, 0)[1]
end

local function leave(member)
  redis.call('ZREM', order, member)
  redis.call('ZREM', seen, member)
end

local function wake(member)
  local id, channel = string.match(member, '^(%S+) (%S+)$')
  redis.call('PUBLISH', channel, 'wake ' .. id)
end

-- Whether a request may take a lock that became free at that time although it is not the first. The first was woken then.
-- If it has been silent for a while it is dead or deaf, and so is everybody else who has not polled since: all of
-- them are woken once more, and those who poll in time still come first.
local function my_turn(member, now, since)
  for _, other in ipairs(redis.call('ZRANGE', order, 0, 99)) do
    if other == member then
      break
    elseif tonumber(redis.call('ZSCORE', seen, other)) >= since then
      return false
    elseif now - since <= grace then
      wake(other)
    end
  end
  return now - since > grace
end
