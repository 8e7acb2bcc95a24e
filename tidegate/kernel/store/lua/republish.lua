-- Claim to publish the message of a job again. Returns its frame with the record's attempt, or nothing if the job has
-- changed or another router publishes it.
local id, attempt, state = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local now = clock()
local job = read(id)
if not job or job.state ~= state or job.attempt ~= attempt or job.lease > now then
  return false
end
local due = call('ZSCORE', DUE, id)
if due and tonumber(due) > now then
  return false
end
if state == 'running' and not retry(job, now) then
  return false
end
local frame = call('GET', REQUEST .. id)
if not frame then
  return false
end
place(DUE, id, now + PATIENCE_MS)
return string.sub(frame, 1, 28) .. string.char(math.min(attempt, 255)) .. string.sub(frame, 30)
