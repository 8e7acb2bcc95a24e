-- Settle with the accounts of callers. KEYS: the accounts. ARGV: the process, then one ask (JSON) an account.
-- An account is a hash: bucket (tokens, at), counts (day, day_used, day_seeded, month, ...), tight (when somebody
-- last lacked slots), and p:<process> = what that process holds: tokens of the bucket, slots, until when.
local HELD_MS, TIGHT_MS, KEEP_MS, KEEP_COUNTS_MS = 5000, 1000, 3600000, 40 * 86400000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local mine = 'p:' .. ARGV[1]

-- What others hold, of which the processes still live.
local function others(account)
  local tokens, slots = 0, 0
  for field, value in pairs(account) do
    if string.sub(field, 1, 2) == 'p:' and field ~= mine then
      local t, s, til = string.match(value, '^(-?%d+):(-?%d+):(%d+)$')
      if tonumber(til) > now then
        tokens, slots = tokens + tonumber(t), slots + tonumber(s)
      else
        account[field] = false
      end
    end
  end
  return tokens, slots
end

-- The balance and the holding after an exchange; no balance rises above cap by what is given back.
local function exchange(balance, have, want, cap)
  if have < 0 then
    balance, have = balance + have, 0
  end
  if have > want then
    return math.max(balance, math.min(cap, balance + have - want)), want
  end
  local more = math.min(want - have, math.floor(math.max(0, balance)))
  return balance - more, have + more
end

-- A count of a period: a new period begins at zero.
local function count(account, name, period, limit, pair)
  if period > (account[name] or '') then
    account[name], account[name .. '_used'], account[name .. '_seeded'] = period, '0', '0'
  end
  local left, held = exchange(limit - tonumber(account[name .. '_used']), pair[1], pair[2], limit)
  account[name .. '_used'] = string.format('%d', limit - left)
  return held, math.max(0, left), account[name .. '_seeded'] == '1'
end

local function settle(key, ask)
  local account, given, flat = {}, { seeded = true }, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    account[flat[i]] = flat[i + 1]
  end
  local keep = KEEP_MS
  local tokens_held, slots_held = others(account)
  local tokens, slots = 0, 0
  if ask.rate then
    local since = math.max(0, now - (tonumber(account.at) or now))
    local cap = ask.burst - tokens_held - math.max(0, ask.of_rate[1])
    local balance = tonumber(account.tokens) or ask.burst
    -- Accrual stops at what is not held; what is there already is not taken away by holdings.
    balance = math.min(math.max(balance, cap), balance + since * ask.rate / 1000, ask.burst)
    balance, tokens = exchange(balance, ask.of_rate[1], ask.of_rate[2], ask.burst)
    account.tokens, account.at = string.format('%.6f', balance), string.format('%d', now)
    given.rate, given.rate_left = tokens, math.max(0, balance)
    given.wait_ms = math.max(0, (1 - balance) * 1000 / ask.rate)
    keep = keep + ask.burst * 1000 / ask.rate
  end
  if ask.concurrency then
    local free = math.max(0, ask.concurrency - slots_held)
    slots = math.max(ask.of_slots[1], math.min(ask.of_slots[2], free))
    if ask.of_slots[2] > free then
      account.tight = string.format('%d', now)
    end
    given.slots, given.tight = slots, now - (tonumber(account.tight) or 0) < TIGHT_MS
  end
  if ask.day_limit then
    local seeded
    given.of_day, given.day_left, seeded = count(account, 'day', ask.day, ask.day_limit, ask.of_day)
    given.seeded, keep = given.seeded and seeded, KEEP_COUNTS_MS
  end
  if ask.month_limit then
    local seeded
    given.of_month, given.month_left, seeded = count(account, 'month', ask.month, ask.month_limit, ask.of_month)
    given.seeded, keep = given.seeded and seeded, KEEP_COUNTS_MS
  end
  account[mine] = (tokens ~= 0 or slots ~= 0) and string.format('%d:%d:%d', tokens, slots, now + HELD_MS)
  local gone, fields = {}, {}
  for field, value in pairs(account) do
    if value then
      fields[#fields + 1], fields[#fields + 2] = field, value
    else
      gone[#gone + 1] = field
    end
  end
  if #gone > 0 then
    redis.call('HDEL', key, unpack(gone))
  end
  if #fields > 0 then
    redis.call('HSET', key, unpack(fields))
    redis.call('PEXPIRE', key, string.format('%d', keep))
  end
  return cjson.encode(given)
end

local answers = {}
for i, key in ipairs(KEYS) do
  answers[i] = settle(key, cjson.decode(ARGV[i + 1]))
end
return answers
