-- Record the results of claimed webhooks. Returns for each: y, or n (the claim has ended). A try is logged in both
-- cases; a job keeps the newest MOST tries.
local WIDTH, MOST = 5, 100
local now = clock()
local out = {}
for at = 1, #ARGV, WIDTH do
  local id, claim, again, logged, counter = unpack(ARGV, at, at + WIDTH - 1)
  if logged ~= '' and call('EXISTS', RECORD .. id) == 1 then
    call('RPUSH', DELIVERIES .. id, logged)
    call('LTRIM', DELIVERIES .. id, -MOST, -1)
  end
  local due = call('ZSCORE', WEBHOOKS, id)
  local ours = due and tonumber(due) == tonumber(claim)
  if ours and again ~= '' then
    call('ZADD', WEBHOOKS, now + tonumber(again), id)
  elseif ours then
    call('ZREM', WEBHOOKS, id)
    if counter ~= '' then
      call('HINCRBY', LEDGER, counter, 1)
    end
  end
  out[#out + 1] = ours and 'y' or 'n'
end
return table.concat(out)
