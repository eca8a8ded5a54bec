-- Takes a request out of the queue, and answers who is the first then.
local function leave(member)
  redis.call('ZREM', KEYS[1] .. ':order', member)
  redis.call('ZREM', KEYS[1] .. ':seen', member)
  return redis.call('ZRANGE', KEYS[1] .. ':order', 0, 0)[1]
end

-- Tells a waiter that its turn may have come.
local function wake(member)
  local id, channel = string.match(member, '^(%S+) (%S+)$')
  redis.call('PUBLISH', channel, 'wake ' .. id)
end

-- The queue, with its functions made only when somebody may wait: that is not free. Whoever has not polled for a while
-- is dead, and is dropped before anybody looks.
local function open_queue()
  local order, seen = KEYS[1] .. ':order', KEYS[1] .. ':seen'
  local queue = {}

  function queue.first(now)
    repeat
      local dead = redis.call('ZRANGEBYSCORE', seen, '-inf', now - patience, 'LIMIT', 0, 1000)
      if #dead > 0 then
        redis.call('ZREM', order, unpack(dead))
        redis.call('ZREM', seen, unpack(dead))
      end
    until #dead < 1000
    return redis.call('ZRANGE', order, 0, 0)[1]
  end

  -- Enters a request, or notes that it is alive, and answers its place, and 1 if it had none before. It comes behind all
  -- others, unless it is told when the request began to wait.
  function queue.enter(member, now, began)
    local new = 0
    if began then
      new = redis.call('ZADD', order, began, member)
    elseif not redis.call('ZSCORE', order, member) then
      new = 1
      -- Later arrivals get greater numbers, even if the clock is set back.
      local newest = redis.call('ZRANGE', order, -1, -1, 'WITHSCORES')[2]
      redis.call('ZADD', order, math.max(now, (newest or 0) + 1), member)
    end
    redis.call('ZADD', seen, now, member)
    redis.call('PEXPIRE', order, patience / 250)
    redis.call('PEXPIRE', seen, patience / 250)
    return redis.call('ZRANK', order, member) + 1, new
  end

  -- Whether a request may take a lock that became free at that time although it is not the first. The first was woken
  -- then, and is woken again: that time is kept as the member ''. If it stays silent it is dead or deaf, and so is
  -- everybody else who has not polled: all of them are woken once more, and those who poll in time, and go on polling,
  -- still come first. The others lose their place.
  function queue.turn(member, now, since)
    if since > now then
      since = now - 2 * grace -- the clock was set back
    end
    local alive, silent = math.max(since, now - 2 * grace), {}
    local others = redis.call('ZRANGE', order, 0, 99)
    local all = #others < 100 -- who are before
    for _, other in ipairs(others) do
      if other == member then
        all = true
        break
      end
      local polled = tonumber(redis.call('ZSCORE', seen, other)) or 0
      if polled >= alive and polled <= now then
        return false
      end
      table.insert(silent, other)
    end
    local woken = tonumber(redis.call('ZSCORE', seen, '')) or 0
    if woken < since or woken > now then
      redis.call('ZADD', seen, now, '')
      woken = now
    end
    local over = now - woken > grace
    for _, other in ipairs(silent) do
      if over then
        leave(other)
      else
        wake(other)
      end
    end
    if over and not all then
      redis.call('ZREM', seen, '') -- the next hundred are woken first
    end
    return over and all
  end

  return queue
end
