-- Return the ids of jobs that are due. No lease could be renewed while this store was away, so leases stay valid for
-- a while after a gap in these calls.
local SWEPT, GAP_MS, GRACE_MS = 'tidegate:job:swept', 10000, 15000
local now = clock()
local last, resumed = unpack(call('HMGET', SWEPT, 'last', 'resumed'))
call('HSET', SWEPT, 'last', now)
if last and now - tonumber(last) > GAP_MS then
  call('HSET', SWEPT, 'resumed', now)
  resumed = now
end
local found = call('ZRANGE', DUE, '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
if not resumed or now - tonumber(resumed) > GRACE_MS then
  return found
end
local out = {}
for _, id in ipairs(found) do
  if tonumber(call('HGET', RECORD .. id, 'lease') or 0) == 0 then
    out[#out + 1] = id
  end
end
return out
