-- Take what was used and is not reported yet. ARGV: a name for it, and how long (ms) others may take to report.
-- Gives the name by which it is to be reported (that of an earlier take that nobody has settled) and the counts.
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
