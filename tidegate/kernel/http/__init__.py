"""The HTTP/1.1 server side that all services share: a protocol class with limits for each connection."""
