-- Charge a request's tokens to all of its accounts, or to none. KEYS: the accounts. ARGV: the tokens, then for
-- each account the most tokens in 60 seconds and in a day (UTC); 0: no limit.
-- An account is a hash: s:<second> = the tokens charged in that second, day and day_used.
local WINDOW_S, KEEP_MS = 60, 2 * 86400000
local time = redis.call('TIME')
local second = tonumber(time[1])
local now = second * 1000 + math.floor(time[2] / 1000)
local day = math.floor(second / 86400)
local tokens = tonumber(ARGV[1])

-- Return the charges of the window in the order of time, their sum, and the fields that are older.
local function window(account)
  local charges, sum, old = {}, 0, {}
  for field, value in pairs(account) do
    if string.sub(field, 1, 2) == 's:' then
      local at = tonumber(string.sub(field, 3))
      if (at + 1 + WINDOW_S) * 1000 <= now then
        old[#old + 1] = field
      else
        charges[#charges + 1] = { at, tonumber(value) }
        sum = sum + tonumber(value)
      end
    end
  end
  table.sort(charges, function(a, b) return a[1] < b[1] end)
  return charges, sum, old
end

-- Return the milliseconds until the window has room for the tokens, and until it is empty.
local function waits(charges, missing)
  local wait, reset = 0, 0
  for _, charge in ipairs(charges) do
    local leaves = (charge[1] + 1 + WINDOW_S) * 1000 - now
    if missing > 0 then
      wait, missing = leaves, missing - charge[2]
    end
    reset = leaves
  end
  return wait, reset
end

local fits, found, day_ms = true, {}, (day + 1) * 86400000 - now
for i, key in ipairs(KEYS) do
  local minute, most = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local account, flat = {}, redis.call('HGETALL', key)
  for n = 1, #flat, 2 do
    account[flat[n]] = flat[n + 1]
  end
  local charges, sum, old = window(account)
  if #old > 0 then
    redis.call('HDEL', key, unpack(old))
  end
  local used = tonumber(account.day) == day and tonumber(account.day_used) or 0
  local balance = { used = sum, day_used = used, day_ms = day_ms }
  balance.wait_ms, balance.reset_ms = waits(charges, minute > 0 and sum + tokens - minute or 0)
  balance.refused = minute > 0 and sum + tokens > minute and 'minute'
    or most > 0 and used + tokens > most and 'day' or ''
  fits = fits and balance.refused == ''
  found[i] = balance
end
if fits and tokens > 0 then
  for i, key in ipairs(KEYS) do
    redis.call('HINCRBY', key, 's:' .. time[1], tokens)
    redis.call('HSET', key, 'day', day, 'day_used', string.format('%d', found[i].day_used + tokens))
    redis.call('PEXPIRE', key, KEEP_MS)
  end
end
return cjson.encode({ at = second, balances = found })
