-- Write the progress of a batch and renew its lease. Return the batch's state, or false if another owner has the
-- lease. `chunks`: JSON, pairs of a list's key and a chunk for it, the results written since the last step;
-- `written` and `counts` include them. A repeated step, after a lost answer, does not add its chunks twice.
-- `files`: JSON, the files that the batch leaves at its end, with their keys: {record, value, chunks, indexes, member,
-- keep_s}.
local OPEN, BATCH, RESULTS = 'tidegate:batch:open', 'tidegate:batch:r:', 'tidegate:batch:results:'
local LINES = 'tidegate:batch:lines:'
local id, owner, lease_ms, done, chunk, written, counts, size, state, failure, keep_s, chunks, files = unpack(ARGV)
local now = clock()
local found = call('HMGET', BATCH .. id, 'owner', 'state')
if found[1] ~= owner or (found[2] ~= 'running' and found[2] ~= 'cancelling') then
  return false
end
call('HSET', BATCH .. id, 'done', done)
if tonumber(written) > tonumber(call('HGET', BATCH .. id, 'written') or 0) then
  if chunk ~= '' then
    call('RPUSH', RESULTS .. id, chunk)
  end
  for _, pair in ipairs(cjson.decode(chunks)) do
    call('RPUSH', pair[1], pair[2])
  end
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
for _, file in ipairs(cjson.decode(files)) do
  call('SET', file.record, file.value, 'EX', file.keep_s)
  call('EXPIRE', file.chunks, file.keep_s)
  for _, index in ipairs(file.indexes) do
    call('ZADD', index, 0, file.member)
  end
end
call('DEL', LINES .. id)
return state
