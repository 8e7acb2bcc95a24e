-- End the lease of the leader at once, if ARGV[1] has it.
if call('HGET', LEADER, 'holder') == ARGV[1] then
  call('DEL', LEADER)
end
return 1
