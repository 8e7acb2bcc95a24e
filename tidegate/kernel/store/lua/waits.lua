-- Record if attempts wait for their upstream or engine, or run (1 or 0). Returns for each: y, or n (another attempt has
-- the job, or it is over).
local WIDTH = 3
local out = {}
for at = 1, #ARGV, WIDTH do
  local id, attempt, waits = unpack(ARGV, at, at + WIDTH - 1)
  local job = read(id)
  local ours = job and job.state == 'running' and job.attempt == tonumber(attempt)
  if ours then
    call('HSET', RECORD .. id, 'waits', waits == '1' and attempt or 0)
  end
  out[#out + 1] = ours and 'y' or 'n'
end
return table.concat(out)
