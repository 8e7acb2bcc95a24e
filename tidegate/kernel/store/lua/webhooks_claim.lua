-- Claim up to ARGV[1] due webhooks for ARGV[2] ms. Returns how many wait in all, the claim (the time of its end), then
-- for each webhook its id and the number of earlier tries.
local limit, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = clock()
local out = {call('ZCARD', WEBHOOKS), now + lease}
for _, id in ipairs(call('ZRANGE', WEBHOOKS, '-inf', now, 'BYSCORE', 'LIMIT', 0, limit)) do
  call('ZADD', WEBHOOKS, now + lease, id)
  out[#out + 1] = id
  out[#out + 1] = call('LLEN', DELIVERIES .. id)
end
return out
