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

  -- Enters a request, or notes that it is alive, and answers its place.
  function queue.enter(member, now)
    if not redis.call('ZSCORE', order, member) then
      -- Later arrivals get greater numbers, even if the clock is set back.
      local newest = redis.call('ZRANGE', order, -1, -1, 'WITHSCORES')[2]
      redis.call('ZADD', order, math.max(now, (newest or 0) + 1), member)
    end
    redis.call('ZADD', seen, now, member)
    redis.call('PEXPIRE', order, patience / 250)
    redis.call('PEXPIRE', seen, patience / 250)
    return redis.call('ZRANK', order, member) + 1
  end

  function queue.leave(member)
    redis.call('ZREM', order, member)
    redis.call('ZREM', seen, member)
  end

  function queue.wake(member)
    local id, channel = string.match(member, '^(%S+) (%S+)$')
    redis.call('PUBLISH', channel, 'wake ' .. id)
  end

  -- Whether a request may take a lock that became free at that time although it is not the first. The first was woken
  -- then, and is woken again: that time is kept as the member ''. If it stays silent it is dead or deaf, and so is everybody else who has not polled: all of them are woken once
  -- more, and those who poll in time, and go on polling, still come first. The others lose their place.
  function queue.turn(member, now, since)
    if since > now then
      since = now - 2 * grace -- the clock was set back
    end
    local alive, silent = math.max(since, now - 2 * grace), {}
    for _, other in ipairs(redis.call('ZRANGE', order, 0, 99)) do
      if other == member then
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
        queue.leave(other)
      else
        queue.wake(other)
      end
    end
    return over
  end

  return queue
end
