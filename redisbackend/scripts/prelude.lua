-- Shared by the scripts of this folder. scripts.go puts it in front of each of them, behind what a script does first:
-- the _idle files end the common case before any of these functions is made.
--
-- All that is known of a lock stands in one string, KEYS[1], so that a script reads one value and writes one:
--
--   <token> <until> <since> <covers> <size> <id> <channel> <label><head>
--
--   token    16 digits: the last fencing token, kept when the lock is free, so that the next one is greater
--   until    16 digits: when the lease ends, 0 if it was released or broken
--   since    16 digits: when it was released or broken, else 0
--   covers   10 digits: until when, in seconds, a lease may end without a new expiry of the state, which is a day later
--   size     4 digits: how many bytes head has; 0 if nobody is known to wait
--   id       the request that holds the lock or held it last, the character 127, which no ID has, if it lost it to a Break
--   channel  where its Locker listens
--   label    who it is, for people
--   head     the first in the queue, "<id> <channel>": a release wakes it without a look at the queue. A grant, a
--            poll and a withdrawal write it. It may have died or been dropped since: then those who poll replace it.
--
-- Times are microseconds by the server's clock, exact as doubles until the year 2255. Fields have fixed places and
-- widths: in scripts this short a pattern costs more than a call to the server, and times compare as text.
--
-- What else belongs to a lock has its name with a suffix, and with it the hash tag and the slot of a cluster:
--
--   :order, :seen   the queue: sorted sets of "<id> <channel>", by arrival and by last poll
--   :gone:<id>      the tombstone of a request: "done" if it was released or withdrawn, "lost" if it lost the lock;
--                   in Redlock "expired" if its vote on this server ended.
--                   The last holder's is the released state itself: only the next grant makes a key of it.
-- When the lease ends, and the size of head.
local function read(state)
  if not state then
    return 0, 0
  end
  local ends, size = tonumber(string.sub(state, 18, 33)), tonumber(string.sub(state, 63, 66))
  if not ends or not size then
    error('the key ' .. KEYS[1] .. ' is in use for something that is not a lock: choose another prefix')
  end
  return ends, size
end

-- Whether the request holds the lock or held it last.
local function belongs(state, id)
  return state and string.sub(state, 68, 68 + #id) == id .. ' '
end

-- The end of a state: size, id, channel, label and head, with another head, which may be ''.
local function tail(state, size, head)
  return string.format('%04d ', #head) .. string.sub(state, 68, -1 - size) .. head
end
