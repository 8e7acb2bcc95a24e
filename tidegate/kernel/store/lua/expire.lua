-- Expire jobs whose time is over. Returns their ids.
local now = clock()
local ids = call('ZRANGE', EXPIRY, '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  finish(read_for_finish(id), 'expired', now)
end
return ids
