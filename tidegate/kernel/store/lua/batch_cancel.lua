-- Mark a running batch as cancelling, for the gateway that runs it. Return its record.
local BATCH = 'tidegate:batch:r:'
if call('HGET', BATCH .. ARGV[1], 'state') == 'running' then
  call('HSET', BATCH .. ARGV[1], 'state', 'cancelling', 'cancelling', clock())
end
return call('HGETALL', BATCH .. ARGV[1])
