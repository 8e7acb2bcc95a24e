-- Count all records at one moment: states, Deployments, ledger, acknowledged, watched.
local states, deployments = {}, {}
for _, state in ipairs({'accepting', 'queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired'}) do
  states[#states + 1] = call('ZCARD', STATE .. state)
end
for _, name in ipairs(call('SMEMBERS', DEPLOYMENTS)) do
  local waiting = 0
  for _, level in ipairs(LEVELS) do
    waiting = waiting + call('ZCARD', WAITING .. name .. ':' .. level)
  end
  local running = call('ZCARD', RUNNING .. name)
  if waiting + running > 0 then
    deployments[#deployments + 1] = {name, waiting, running}
  else
    call('SREM', DEPLOYMENTS, name)
  end
end
return {states, deployments, call('HGETALL', LEDGER), call('HGETALL', ACKNOWLEDGED), call('ZCARD', DUE)}
