-- Become or stay the leader of the routers. ARGV: the candidate, the length of the lease (ms), the highest epoch that
-- the candidate has seen, and a holder that it knows to be dead (or nothing). Returns the holder, its epoch, and the
-- rest of its lease (ms).
local candidate, ttl, seen, dead = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local holder, held = unpack(call('HMGET', LEADER, 'holder', 'epoch'))
if holder == dead then
  holder = false
end
if holder and holder ~= candidate then
  return {holder, tonumber(held), call('PTTL', LEADER)}
end
local epoch = tonumber(held or 0)
if not holder or epoch <= seen then
  -- The clock keeps epochs rising even if this store has lost the last one.
  epoch = math.max(tonumber(call('GET', EPOCH) or 0), seen, clock()) + 1
  call('SET', EPOCH, string.format('%d', epoch))
  call('HSET', LEADER, 'holder', candidate, 'epoch', string.format('%d', epoch))
end
call('PEXPIRE', LEADER, ttl)
return {candidate, epoch, ttl}
