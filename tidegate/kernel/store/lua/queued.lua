-- Record that the broker has confirmed the messages of these jobs, so the router need not check them.
local now = clock()
for _, id in ipairs(ARGV) do
  local state, deployment, level, lease =
    unpack(call('HMGET', RECORD .. id, 'state', 'deployment', 'level', 'lease'))
  if state and not OVER[state] then
    if state == 'accepting' then
      move({id = id, state = state, deployment = deployment, level = level}, 'queued')
      call('HSET', RECORD .. id, 'state', 'queued', 'queued', now)
      note(id, now, 'queued', 0)
    end
    lease = tonumber(lease) or 0
    if lease <= now then
      displace(DUE, id)
      if lease > 0 then
        call('HSET', RECORD .. id, 'lease', 0)
      end
    end
  end
end
return 1
