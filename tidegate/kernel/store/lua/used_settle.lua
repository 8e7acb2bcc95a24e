-- What was taken under the name ARGV[1] is reported.
call('DEL', USED .. ':' .. ARGV[1])
call('ZREM', USED .. ':open', ARGV[1])
return 1
