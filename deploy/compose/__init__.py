"""`make compose-up` and `make compose-down`: control the stack in containers. Standard library only."""
