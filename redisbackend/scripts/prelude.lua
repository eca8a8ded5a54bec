-- Shared by the scripts of this folder: scripts.go puts it in front of each of them.
--
-- All that is known of a lock stands in one string, KEYS[1], so that a script reads one value and writes one:
--
--   <token> <until> <expiry> <queue> <rest>
--
--   token   16 digits: the last fencing token, kept when the lock is free, so that the next one is greater
--   until   16 digits: when the lease ends, 0 if the lock was released
--   expiry  10 digits: when this state may be forgotten, in seconds
--   queue   1 if somebody may be waiting, else 0: an empty queue costs no call
--   rest    of a lease "<id> <channel> <label>": the request that holds the lock, where its Locker listens, and who
--           it is, for people; of a released lock "<id> <time>": the last holder, empty if it was broken, and when
--
-- Times are microseconds by the server's clock, exact as doubles until the year 2255. Fields have fixed places, because
-- in scripts this short a pattern costs more than a call to the server.
--
-- What else belongs to a lock has its name with a suffix, and with it the hash tag and the slot of a cluster:
--
--   :order, :seen   the queue: sorted sets of "<id> <channel>", by arrival and by last poll
--   :gone:<id>      the tombstone of a request: "done" if it was released or withdrawn, "lost" if it lost the lock.
--                   The last holder's is the released state itself: only the next grant makes a key of it.
local released = '0000000000000000'
local day = 86400

-- The time, as a number and in 16 digits.
local function clock()
  local time = redis.call('TIME')
  local text = time[1] .. string.sub('00000' .. time[2], -6)
  return tonumber(text), text
end

-- Token, until, expiry and queue. Only until becomes a number.
local function read(state)
  if not state then
    return released, 0, '0', '0'
  end
  local ends = tonumber(string.sub(state, 18, 33))
  if not ends then
    error('the key ' .. KEYS[1] .. ' is in use for something that is not a lock: choose another prefix')
  end
  return string.sub(state, 1, 16), ends, string.sub(state, 35, 44), string.sub(state, 46, 46)
end

local function rest(state)
  return string.sub(state, 48)
end

-- Whether a lease that has not ended is that of the request.
local function holds(state, id)
  return string.sub(state, 48, 48 + #id) == id .. ' '
end
