-- Notes since when this server remembers everything: a server that was restarted may have forgotten votes. It is called
-- first on every connection, so that no other script runs in a process that has not been noted.
--
-- KEYS   1 marker: "<run> <born>", the run of the server and the time since when it remembers
-- ARGV   1 "keeps" if a restart loses nothing
-- Reply  {run, time in microseconds}
local now, text = clock()
local info = redis.call('INFO', 'server')
local run, uptime = string.match(info, 'run_id:(%x+)'), string.match(info, 'uptime_in_seconds:(%d+)')
local marker = redis.call('GET', KEYS[1])
local known, born = string.match(marker or '', '^(%x+) (%d+)$')
if known ~= run then
  if not known then
    born = text
  elseif ARGV[1] ~= 'keeps' then
    born = string.format('%016.0f', math.max(tonumber(born), now - uptime * 1000000))
  end
  redis.call('SET', KEYS[1], run .. ' ' .. born)
end
return {run, now}
