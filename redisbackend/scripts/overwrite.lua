-- Writes also on a server that is out of memory: a lock that could not be extended or released would be lost to
-- everybody, and takes no more room than before. Redis lets a script go on writing once it has done a write that needs
-- no memory.
local function overwrite(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    redis.call('ZREM', KEYS[1] .. ':seen', '')
    redis.call(...)
  end
end
