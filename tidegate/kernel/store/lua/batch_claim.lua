-- Lease a batch whose lease has ended, and return its id; false if there is none. ARGV: owner, lease in ms.
local OPEN, BATCH = 'tidegate:batch:open', 'tidegate:batch:r:'
local owner, lease_ms = ARGV[1], tonumber(ARGV[2])
local now = clock()
local id = call('ZRANGE', OPEN, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
if not id then
  return false
end
call('ZADD', OPEN, now + lease_ms, id)
call('HSET', BATCH .. id, 'owner', owner)
return id
