-- Record the ends of attempts. Returns for each: y, or n (another attempt has the job).
local WIDTH = 11
local now = clock()
local out = {}
for at = 1, #ARGV, WIDTH do
  local id, attempt, state, reply, failure, reason, wait, compute, used_us, tokens_in, tokens_out =
    unpack(ARGV, at, at + WIDTH - 1)
  local job = read_for_finish(id)
  local ours = job and job.attempt == tonumber(attempt)
  if ours and job.state == 'running' then
    if reply ~= '' then
      keep(REPLY .. id, reply)
    end
    finish(job, state, now, reason, 'wait', wait, 'compute', compute, 'size', #reply, 'error', failure)
    used(job, now, 'compute_us', tonumber(used_us))
    used(job, now, 'sent_bytes', #reply)
    used(job, now, 'tokens_in', tonumber(tokens_in))
    used(job, now, 'tokens_out', tonumber(tokens_out))
    out[#out + 1] = 'y'
  else
    out[#out + 1] = ours and job.state == state and 'y' or 'n' -- y: a repeated call, whose answer was lost
  end
end
return table.concat(out)
