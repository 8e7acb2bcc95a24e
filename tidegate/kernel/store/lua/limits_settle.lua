-- Settle with the accounts of callers. KEYS: the accounts. ARGV: the process, then a request (JSON) for each.
-- An account is a hash: bucket (tokens, at), counts (day, day_used, day_seeded, month, ...), tight (when a
-- process last lacked slots), and p:<process> = the holdings of that process: tokens, slots, expiry.
local HELD_MS, TIGHT_MS, KEEP_MS, KEEP_COUNTS_MS = 5000, 1000, 3600000, 40 * 86400000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local mine = 'p:' .. ARGV[1]

-- The holdings of the other processes, without those that have expired.
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

-- Return the balance and the holding after an exchange. Returned tokens raise the balance to cap at most.
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

-- Settle the count of a period. A new period begins at zero.
local function count(account, name, period, limit, pair)
  if period > (account[name] or '') then
    account[name], account[name .. '_used'], account[name .. '_seeded'] = period, '0', '0'
  end
  local left, held = exchange(limit - tonumber(account[name .. '_used']), pair[1], pair[2], limit)
  account[name .. '_used'] = string.format('%d', limit - left)
  return held, math.max(0, left), account[name .. '_seeded'] == '1'
end

local function settle(key, request)
  local account, grant, flat = {}, { seeded = true }, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    account[flat[i]] = flat[i + 1]
  end
  local keep = KEEP_MS
  local tokens_held, slots_held = others(account)
  local tokens, slots = 0, 0
  if request.rate then
    local since = math.max(0, now - (tonumber(account.at) or now))
    local cap = request.burst - tokens_held - math.max(0, request.tokens[1])
    local balance = tonumber(account.tokens) or request.burst
    -- The bucket fills up to the burst less all holdings. A balance that is higher already stays.
    balance = math.min(math.max(balance, cap), balance + since * request.rate / 1000, request.burst)
    balance, tokens = exchange(balance, request.tokens[1], request.tokens[2], request.burst)
    account.tokens, account.at = string.format('%.6f', balance), string.format('%d', now)
    grant.rate, grant.rate_left = tokens, math.max(0, balance)
    grant.wait_ms = math.max(0, (1 - balance) * 1000 / request.rate)
    keep = keep + request.burst * 1000 / request.rate
  end
  if request.concurrency then
    local free = math.max(0, request.concurrency - slots_held)
    slots = math.max(request.slots[1], math.min(request.slots[2], free))
    if request.slots[2] > free then
      account.tight = string.format('%d', now)
    end
    grant.slots, grant.tight = slots, now - (tonumber(account.tight) or 0) < TIGHT_MS
  end
  if request.day_limit then
    local seeded
    grant.day_quota, grant.day_left, seeded =
      count(account, 'day', request.day, request.day_limit, request.day_quota)
    grant.seeded, keep = grant.seeded and seeded, KEEP_COUNTS_MS
  end
  if request.month_limit then
    local seeded
    grant.month_quota, grant.month_left, seeded =
      count(account, 'month', request.month, request.month_limit, request.month_quota)
    grant.seeded, keep = grant.seeded and seeded, KEEP_COUNTS_MS
  end
  -- Amounts of money. The registry does not know what was spent before, so these counts are never seeded.
  if request.day_budget_limit then
    grant.day_budget, grant.day_budget_left =
      count(account, 'day_budget', request.day, request.day_budget_limit, request.day_budget)
    keep = KEEP_COUNTS_MS
  end
  if request.month_budget_limit then
    grant.month_budget, grant.month_budget_left =
      count(account, 'month_budget', request.month, request.month_budget_limit, request.month_budget)
    keep = KEEP_COUNTS_MS
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
  return cjson.encode(grant)
end

local answers = {}
for i, key in ipairs(KEYS) do
  answers[i] = settle(key, cjson.decode(ARGV[i + 1]))
end
return answers
