-- Delete the usage that was taken under the name ARGV[1]: it is reported.
call('DEL', USED .. ':' .. ARGV[1])
call('ZREM', USED .. ':open', ARGV[1])
return 1
