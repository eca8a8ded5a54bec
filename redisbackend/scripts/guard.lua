-- Stores a value unless it has been stored with a greater token before.
--
-- KEYS   1 a hash with the fields "token" and "value"
-- ARGV   1 token   2 value
-- Reply  1 stored   0 refused: the token is stale
if tonumber(redis.call('HGET', KEYS[1], 'token') or 0) > tonumber(ARGV[1]) then
  return 0
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'value', ARGV[2])
return 1
