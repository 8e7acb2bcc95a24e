-- Correct the charge of a request whose tokens are known now. KEYS: its accounts. ARGV: the second of the charge,
-- the difference, and 1 if a difference above 0 counts now when that second has left the window.
local WINDOW_S, KEEP_MS = 60, 2 * 86400000
local time = redis.call('TIME')
local second = tonumber(time[1])
local now = second * 1000 + math.floor(time[2] / 1000)
local at, difference = tonumber(ARGV[1]), tonumber(ARGV[2])
local day = math.floor(second / 86400)

for _, key in ipairs(KEYS) do
  local counted = at
  if (at + 1 + WINDOW_S) * 1000 <= now then
    counted = difference > 0 and ARGV[3] == '1' and second or nil
  end
  if counted then
    local field = 's:' .. string.format('%d', counted)
    if redis.call('HINCRBY', key, field, difference) <= 0 then
      redis.call('HDEL', key, field)
    end
  end
  local same = tonumber(redis.call('HGET', key, 'day') or -1) == day
  if same and (math.floor(at / 86400) == day or difference > 0) then
    local used = tonumber(redis.call('HGET', key, 'day_used') or 0)
    redis.call('HSET', key, 'day_used', string.format('%d', math.max(0, used + difference)))
  elseif difference > 0 then
    redis.call('HSET', key, 'day', day, 'day_used', difference)
  end
  redis.call('PEXPIRE', key, KEEP_MS)
end
return #KEYS
