-- Cancel a job unless it is over. Returns the record as it is then.
local job = read_for_finish(ARGV[1])
if job and not OVER[job.state] then
  finish(job, 'cancelled', clock())
end
return call('HGETALL', RECORD .. ARGV[1])
