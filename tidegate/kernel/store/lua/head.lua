-- The start of every script: the keys, and the transitions of a job. Ids are 16 raw bytes.
--
--   tidegate:job:r:<id>            the record (a hash)
--   tidegate:job:request:<id>      its request frame, until it is over; of a failed job until its removal
--   tidegate:job:reply:<id>        its reply frame
--   tidegate:job:log:<id>          a list: "<ms> <state> <attempt> <detail>"
--   tidegate:job:changed:<id>      a channel: a message at each transition
--   tidegate:job:idem:<sha256>     an idempotency key: id and sha256 of the body
--   tidegate:job:all               ids in the order of creation; the following are parts of it:
--   tidegate:job:state:<state>  tidegate:job:of:{deployment,endpoint,principal,batch}:<name>
--   tidegate:job:waiting:<deployment>:<level>  tidegate:job:running:<deployment>
--   tidegate:job:deployments       names of Deployments that have or had jobs
--   tidegate:job:due               ids by the time (ms) when the router must check them: not confirmed by the
--                                  broker, or leased
--   tidegate:job:expiry            ids of unfinished jobs, by the time (ms) when they expire
--   tidegate:job:finished          ids of finished jobs, by the time (ms) of their end
--   tidegate:job:webhooks          ids by the time (ms) when their webhook is due
--   tidegate:job:deliveries:<id>   a list: the tries to send it, JSON
--   tidegate:job:ledger            a hash: totals
--   tidegate:job:acknowledged      a hash: the 202s of each gateway process
--   tidegate:job:used              a hash: usage that is not reported yet; fields are
--                                  "<day>\n<principal>\n<endpoint>\n<what>", the day since the epoch
--   tidegate:job:used:<take>       the same, while it is reported; tidegate:job:used:open has the start (ms)
--   tidegate:router:leader         a hash: the router that leads and its epoch; expires with its lease
--   tidegate:router:epoch          the last epoch that was given to a leader; never expires
local RECORD, REQUEST, REPLY = 'tidegate:job:r:', 'tidegate:job:request:', 'tidegate:job:reply:'
local LOG, CHANGED, IDEM = 'tidegate:job:log:', 'tidegate:job:changed:', 'tidegate:job:idem:'
local ALL, STATE, OF = 'tidegate:job:all', 'tidegate:job:state:', 'tidegate:job:of:'
local WAITING, RUNNING = 'tidegate:job:waiting:', 'tidegate:job:running:'
local DEPLOYMENTS, DUE, EXPIRY = 'tidegate:job:deployments', 'tidegate:job:due', 'tidegate:job:expiry'
local FINISHED, WEBHOOKS = 'tidegate:job:finished', 'tidegate:job:webhooks'
local DELIVERIES = 'tidegate:job:deliveries:'
local LEDGER, ACKNOWLEDGED = 'tidegate:job:ledger', 'tidegate:job:acknowledged'
local USED = 'tidegate:job:used'
local LEADER, EPOCH = 'tidegate:router:leader', 'tidegate:router:epoch'
local OVER = {succeeded = true, failed = true, cancelled = true, expired = true}
local LEVELS = {'high', 'normal', 'low'}
-- Time for a message's confirm, and for the mark of a republished one.
local PATIENCE_MS = 10000

local call = redis.call

local function clock()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Changes of indexes (sorted sets) and totals, frames, and deletions are collected and made together at the end of a
-- script (`settle`), because each call has a high fixed cost. So a script must read an index or a frame before it
-- changes it. The last change of an id in an index counts.
local changes, changed, totals, usage, frames, deleted = {}, {}, {}, {}, {}, {}
local AT_ONCE = 1000

local function place(index, id, score)
  local found = changes[index]
  if not found then
    found = {}
    changes[index] = found
    changed[#changed + 1] = index
  end
  found[id] = score
end

local function displace(index, id)
  place(index, id, false)
end

local function keep(key, frame)
  frames[#frames + 1] = key
  frames[#frames + 1] = frame
end

local function count(name)
  totals[name] = (totals[name] or 0) + 1
end

-- Count the usage of a job's caller, unless the caller is unknown.
local function used(job, now, what, number)
  if number > 0 and job.principal ~= 'anonymous' and job.principal ~= 'service' then
    local day = string.format('%d', math.floor(now / 86400000))
    local field = table.concat({day, job.principal, job.endpoint, what}, '\n')
    usage[field] = (usage[field] or 0) + number
  end
end

local function together(command, first, list)
  for at = 1, #list, AT_ONCE do
    local last = math.min(at + AT_ONCE - 1, #list)
    if first then
      call(command, first, unpack(list, at, last))
    else
      call(command, unpack(list, at, last))
    end
  end
end

local function settle()
  for _, index in ipairs(changed) do
    local into, out = {}, {}
    for id, score in pairs(changes[index]) do
      if score then
        into[#into + 1] = score
        into[#into + 1] = id
      else
        out[#out + 1] = id
      end
    end
    together('ZADD', index, into)
    together('ZREM', index, out)
  end
  for name, number in pairs(totals) do
    call('HINCRBY', LEDGER, name, number)
  end
  for field, number in pairs(usage) do
    call('HINCRBY', USED, field, string.format('%d', number))
  end
  together('MSET', nil, frames)
  together('DEL', nil, deleted)
end

local function note(id, now, state, attempt, detail)
  call('RPUSH', LOG .. id, string.format('%d %s %d %s', now, state, attempt, detail or ''))
  call('PUBLISH', CHANGED .. id, state)
end

-- Return the part of a record that transitions need, or nil.
local function read(id)
  local found = call('HMGET', RECORD .. id,
    'state', 'attempt', 'deployment', 'level', 'expires', 'worker', 'token', 'lease', 'webhook', 'safe',
    'principal', 'endpoint')
  if not found[1] then
    return nil
  end
  return {
    id = id, state = found[1], attempt = tonumber(found[2]), deployment = found[3], level = found[4],
    expires = tonumber(found[5]), worker = found[6] or '', token = found[7] or '',
    lease = tonumber(found[8]) or 0, webhook = found[9] == '1', safe = found[10] == '1',
    principal = found[11], endpoint = found[12],
  }
end

-- Return the part of a record that `finish` needs, or nil. Each field costs a search in the record.
local function read_for_finish(id)
  local found = call('HMGET', RECORD .. id,
    'state', 'attempt', 'deployment', 'level', 'webhook', 'principal', 'endpoint')
  if not found[1] then
    return nil
  end
  return {
    id = id, state = found[1], attempt = tonumber(found[2]), deployment = found[3], level = found[4],
    webhook = found[5] == '1', principal = found[6], endpoint = found[7],
  }
end

local function move(job, state)
  displace(STATE .. job.state, job.id)
  place(STATE .. state, job.id, 0)
  if job.state == 'running' then
    displace(RUNNING .. job.deployment, job.id)
  elseif state ~= 'queued' then
    displace(WAITING .. job.deployment .. ':' .. job.level, job.id)
  end
  if state == 'running' then
    place(RUNNING .. job.deployment, job.id, 0)
  end
end

-- Move a job to a terminal state, with more fields of the record. `detail` is for the log.
local function finish(job, state, now, detail, ...)
  local id = job.id
  move(job, state)
  call('HSET', RECORD .. id, 'state', state, 'finished', now, 'lease', 0, ...)
  displace(DUE, id)
  displace(EXPIRY, id)
  place(FINISHED, id, now)
  count(state)
  if state ~= 'failed' then
    deleted[#deleted + 1] = REQUEST .. id
  end
  if job.webhook then
    place(WEBHOOKS, id, now)
  end
  used(job, now, 'requests', 1)
  used(job, now, 'failed', state == 'succeeded' and 0 or 1)
  note(id, now, state, job.attempt, detail)
end

local function fail(job, now, reason, message)
  finish(job, 'failed', now, reason, 'error', cjson.encode({reason = reason, message = message}))
end

-- Return true if a running job waits for its upstream or engine, so nothing of it runs. `waits` is the attempt that
-- waits, and `waited` is the number of attempts that were lost while they waited. Only lost jobs need them, so they are
-- read here.
local function idle(job)
  if not job.waits then
    local found = call('HMGET', RECORD .. job.id, 'waits', 'waited')
    job.waits, job.waited = tonumber(found[1]) or 0, tonumber(found[2]) or 0
  end
  return job.waits > 0 and job.waits == job.attempt
end

-- Return true if a job whose worker was lost may be retried. If not, fail it. A wait is no attempt.
local function retry(job, now)
  if idle(job) then
    return true
  end
  local attempts = job.attempt - job.waited
  if not job.safe then
    fail(job, now, 'worker_lost',
      'The worker was lost while it ran the job, and the deployment says that it must not run twice.')
    return false
  end
  if attempts >= 3 then
    fail(job, now, 'attempts_exhausted',
      'The worker was lost in each of ' .. attempts .. ' attempts to run the job.')
    return false
  end
  return true
end
