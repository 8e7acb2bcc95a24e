-- Take jobs to run now. Returns for each: "<r|d|f|e|s> <attempt>" (run, drop, failed, expired, suspect: it was lost
-- before and may only run alone).
local WIDTH = 7
local now = clock()
local out = {}

local function begin(job, worker, token)
  local leased = job.lease > now and job.worker == worker
  local more = {}
  if job.state == 'accepting' then
    -- Its message arrived before the mark that follows the broker's confirm.
    more = {'queued', now}
  elseif job.waits and job.waits > 0 then
    more = {'waits', 0, 'waited', job.waited + (idle(job) and 1 or 0)}
  end
  if job.state ~= 'running' then
    move(job, 'running')
  end
  if not leased then
    displace(DUE, job.id)
  end
  job.attempt = job.attempt + 1
  call('HSET', RECORD .. job.id, 'state', 'running', 'attempt', job.attempt, 'started', now, 'worker', worker,
    'token', token, 'lease', leased and job.lease or 0, unpack(more))
  note(job.id, now, 'running', job.attempt, worker)
end

-- Return true if a message of a running job shows that its attempt was lost. Else the message is a duplicate.
local function was_lost(job, redelivered, frame_attempt)
  return job.lease <= now and (redelivered or frame_attempt == math.min(job.attempt, 255))
end

local function take(job, worker, redelivered, frame_attempt, token, lost, alone)
  if not job or OVER[job.state] then
    return 'd'
  end
  local own = job.state == 'running' and token ~= '' and job.token == token
  if own and job.attempt ~= lost then
    return 'r' -- a repeated call, whose answer was lost
  end
  if job.expires <= now then
    finish(job, 'expired', now)
    return 'e'
  end
  if job.state == 'running' then
    if not own and not was_lost(job, redelivered, frame_attempt) then
      return 'd'
    end
    if not retry(job, now) then
      return 'f'
    end
    if not alone and not idle(job) then
      return 's'
    end
  elseif job.lease > now and job.worker ~= worker then
    return 'd'
  end
  begin(job, worker, token)
  return 'r'
end

for at = 1, #ARGV, WIDTH do
  local id, worker, redelivered, frame_attempt, token, lost, alone = unpack(ARGV, at, at + WIDTH - 1)
  local job = read(id)
  local outcome = take(job, worker, redelivered == '1', tonumber(frame_attempt), token, tonumber(lost), alone == '1')
  out[#out + 1] = outcome .. ' ' .. (job and job.attempt or 0)
end
return table.concat(out, ',')
