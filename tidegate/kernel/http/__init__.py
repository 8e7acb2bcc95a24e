"""The HTTP/1.1 server side that all services share: one protocol class, and the limits of a connection."""
