"""`make compose-up` and `make compose-down`: control the stack in containers.

The package needs only the standard library.
"""
