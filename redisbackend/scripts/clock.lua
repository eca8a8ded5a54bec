-- The time, as a number and in 16 digits.
local function clock()
  local time = redis.call('TIME')
  local text = time[1] .. string.sub('00000' .. time[2], -6)
  return tonumber(text), text
end

