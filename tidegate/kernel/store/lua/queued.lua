-- Record that the broker has confirmed the messages of these jobs, so the router need not check them.
local now = clock()
for _, id in ipairs(ARGV) do
  local job = read(id)
  if job and not OVER[job.state] then
    if job.state == 'accepting' then
      move(job, 'queued')
      call('HSET', RECORD .. id, 'state', 'queued', 'queued', now)
      note(id, now, 'queued', 0)
    end
    if job.lease <= now then
      displace(DUE, id)
      if job.lease > 0 then
        call('HSET', RECORD .. id, 'lease', 0)
      end
    end
  end
end
return 1
