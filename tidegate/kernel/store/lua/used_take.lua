-- Take the usage that is not reported yet. ARGV: a name for it, and the time (ms) that a taker has to report.
-- Return the counts and the name to report them under. An earlier take that was not settled in time comes first.
local OPEN = USED .. ':open'
local now = clock()
local name = call('ZRANGEBYSCORE', OPEN, '-inf', now - tonumber(ARGV[2]), 'LIMIT', 0, 1)[1]
if not name and call('EXISTS', USED) == 1 then
  name = ARGV[1]
  call('RENAME', USED, USED .. ':' .. name)
end
if not name then
  return false
end
call('ZADD', OPEN, now, name)
return {name, call('HGETALL', USED .. ':' .. name)}
