-- Add the usage from before an account began to count. ARGV: day, requests, month, requests.
local function seed(name, period, used)
  local held = redis.call('HMGET', KEYS[1], name, name .. '_seeded')
  if held[1] == period and held[2] == '0' then
    redis.call('HINCRBY', KEYS[1], name .. '_used', used)
    redis.call('HSET', KEYS[1], name .. '_seeded', '1')
  end
end

seed('day', ARGV[1], ARGV[2])
seed('month', ARGV[3], ARGV[4])
