-- Record jobs. Returns for each: n (new, or known by its id), k and an id (its idempotency key is known with the
-- same body), or c (the key is known with another body).
local WIDTH = 14
local now = clock()
local out, known_deployments = {}, {}

-- One call for all jobs, because almost all are new.
local records, seen = {}, {}
for at = 1, #ARGV, WIDTH do
  records[#records + 1] = RECORD .. ARGV[at]
end
local all_new = call('EXISTS', unpack(records)) == 0

for at = 1, #ARGV, WIDTH do
  local id, frame, facts, deployment, endpoint, principal, batch, level, expires, safe, webhook, idem, body, created =
    unpack(ARGV, at, at + WIDTH - 1)
  local known = idem ~= '' and call('GET', IDEM .. idem)
  if known and string.sub(known, 1, 16) ~= id then
    out[#out + 1] = string.sub(known, 17) == body and 'k' .. string.sub(known, 1, 16) or 'c'
  else
    out[#out + 1] = 'n'
    if not seen[id] and (all_new or call('EXISTS', RECORD .. id) == 0) then
      seen[id] = true
      call('HSET', RECORD .. id, 'state', 'accepting', 'attempt', 0, 'deployment', deployment, 'level', level,
        'expires', expires, 'webhook', webhook, 'safe', safe, 'created', created, 'endpoint', endpoint,
        'principal', principal, 'batch', batch, 'idem', idem, 'facts', facts)
      keep(REQUEST .. id, frame)
      place(ALL, id, 0)
      place(STATE .. 'accepting', id, 0)
      place(OF .. 'deployment:' .. deployment, id, 0)
      place(OF .. 'endpoint:' .. endpoint, id, 0)
      place(OF .. 'principal:' .. principal, id, 0)
      if batch ~= '' then
        place(OF .. 'batch:' .. batch, id, 0)
      end
      place(WAITING .. deployment .. ':' .. level, id, 0)
      if not known_deployments[deployment] then
        known_deployments[deployment] = true
        call('SADD', DEPLOYMENTS, deployment)
      end
      place(DUE, id, now + PATIENCE_MS)
      place(EXPIRY, id, expires)
      if idem ~= '' then
        call('SET', IDEM .. idem, id .. body)
      end
      count('accepted')
      call('RPUSH', LOG .. id, string.format('%d accepting 0 ', now))
    end
  end
end
return out
