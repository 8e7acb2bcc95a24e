-- Remove jobs that ended before a time, and the oldest above a number. Returns how many.
local before, keep, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local ids = call('ZRANGE', FINISHED, '-inf', '(' .. before, 'BYSCORE', 'LIMIT', 0, limit)
local surplus = math.min(call('ZCARD', FINISHED) - keep, limit)
if surplus > #ids then
  ids = call('ZRANGE', FINISHED, 0, surplus - 1)
end
for _, id in ipairs(ids) do
  local state, deployment, endpoint, principal, batch, idem = unpack(call('HMGET', RECORD .. id,
    'state', 'deployment', 'endpoint', 'principal', 'batch', 'idem'))
  displace(ALL, id)
  displace(STATE .. state, id)
  displace(OF .. 'deployment:' .. deployment, id)
  displace(OF .. 'endpoint:' .. endpoint, id)
  displace(OF .. 'principal:' .. principal, id)
  if batch ~= '' then
    displace(OF .. 'batch:' .. batch, id)
  end
  if idem ~= '' then
    call('DEL', IDEM .. idem)
  end
  displace(FINISHED, id)
  displace(WEBHOOKS, id)
  count('removed')
  call('DEL', RECORD .. id, REQUEST .. id, REPLY .. id, LOG .. id, DELIVERIES .. id)
end
return #ids
