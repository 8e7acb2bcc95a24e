-- A batch that runs is to be cancelled, by whoever works at it. Gives its record.
local BATCH = 'tidegate:batch:r:'
if call('HGET', BATCH .. ARGV[1], 'state') == 'running' then
  call('HSET', BATCH .. ARGV[1], 'state', 'cancelling')
end
return call('HGETALL', BATCH .. ARGV[1])
