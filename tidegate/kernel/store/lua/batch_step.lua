-- Who works at a batch has come further. Gives the state that the batch has now, or nothing when it is somebody
-- else's by now. `chunk`: results that are on disk since the last step, with `written` and `counts` up to them;
-- told again, because the answer was lost, it is not taken twice.
local OPEN, BATCH, RESULTS = 'tidegate:batch:open', 'tidegate:batch:r:', 'tidegate:batch:results:'
local LINES = 'tidegate:batch:lines:'
local id, owner, lease_ms, done, chunk, written, counts, size, state, failure, keep_s = unpack(ARGV)
local now = clock()
local found = call('HMGET', BATCH .. id, 'owner', 'state')
if found[1] ~= owner or (found[2] ~= 'running' and found[2] ~= 'cancelling') then
  return false
end
call('HSET', BATCH .. id, 'done', done)
if chunk ~= '' and tonumber(written) > tonumber(call('HGET', BATCH .. id, 'written') or 0) then
  call('RPUSH', RESULTS .. id, chunk)
end
call('HSET', BATCH .. id, 'written', written, 'counts', counts, 'size', size)
if state == '' then
  call('ZADD', OPEN, now + tonumber(lease_ms), id)
  return found[2]
end
call('HSET', BATCH .. id, 'state', state, 'finished', now, 'error', failure)
call('ZREM', OPEN, id)
for _, key in ipairs({BATCH .. id, RESULTS .. id}) do
  call('EXPIRE', key, keep_s)
end
call('DEL', LINES .. id)
return state
