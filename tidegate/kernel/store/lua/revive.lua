-- Make waiting jobs of a Deployment due, because their messages are lost: those created before an id. If ARGV[3] is 1,
-- no worker holds a message, so jobs that run without a lease are due too. A job becomes due only once in a while.
-- Returns how many.
local deployment, before, orphans = ARGV[1], ARGV[2], ARGV[3] == '1'
local LOOK, AGAIN_MS = 5000, 600000
local now = clock()
local revived = 0

local function revive(index, state)
  for _, id in ipairs(call('ZRANGE', index, '-', '(' .. before, 'BYLEX', 'LIMIT', 0, LOOK)) do
    local found, lease, last = unpack(call('HMGET', RECORD .. id, 'state', 'lease', 'revived'))
    local free = found == state and (tonumber(lease or 0) == 0) and not call('ZSCORE', DUE, id)
    if free and now - tonumber(last or 0) > AGAIN_MS then
      call('HSET', RECORD .. id, 'revived', now)
      place(DUE, id, now)
      revived = revived + 1
    end
  end
end

for _, level in ipairs(LEVELS) do
  revive(WAITING .. deployment .. ':' .. level, 'queued')
end
if orphans then
  revive(RUNNING .. deployment, 'running')
end
return revived
