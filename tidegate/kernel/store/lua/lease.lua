-- Lease jobs to workers, which ack the jobs' messages. Returns for each: y or n.
local WIDTH = 4
local now = clock()
local out = {}
for at = 1, #ARGV, WIDTH do
  local id, attempt, worker, till = unpack(ARGV, at, at + WIDTH - 1)
  local job = read(id)
  local free = job and not OVER[job.state] and job.attempt == tonumber(attempt)
  local ours = free and (job.worker == worker or (job.state ~= 'running' and job.lease <= now))
  if ours then
    call('HSET', RECORD .. id, 'lease', till, 'worker', worker)
    place(DUE, id, till)
  end
  out[#out + 1] = ours and 'y' or 'n'
end
return table.concat(out)
