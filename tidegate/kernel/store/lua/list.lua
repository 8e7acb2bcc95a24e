-- Return a part of a list, newest first: the id to continue before (empty: the end), then the records. Reads a limited
-- number of records, in the shortest index that has all matches.
local LOOK = 1000
local before, limit = ARGV[1], tonumber(ARGV[2])
local fields, wanted = {}, {}
local index, size = ALL, call('ZCARD', ALL)
for at = 3, #ARGV, 2 do
  local field, value = ARGV[at], ARGV[at + 1]
  fields[#fields + 1], wanted[#wanted + 1] = field, value
  local key = (field == 'state' and STATE or OF .. field .. ':') .. value
  local count = call('ZCARD', key)
  if count < size then
    index, size = key, count
  end
end
local ids = call('ZRANGE', index, before == '' and '+' or '(' .. before, '-', 'BYLEX', 'REV', 'LIMIT', 0, LOOK)
local out = {''}
for at, id in ipairs(ids) do
  if limit == 0 then
    out[1] = ids[at - 1]
    return out
  end
  local fits = true
  if #fields > 0 then
    local found = call('HMGET', RECORD .. id, unpack(fields))
    for n, value in ipairs(wanted) do
      fits = fits and found[n] == value
    end
  end
  if fits then
    out[#out + 1] = id
    limit = limit - 1
  end
end
if #ids == LOOK then
  out[1] = ids[LOOK]
end
return out
