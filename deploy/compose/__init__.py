"""The compose stack from the outside: `make compose-up`, `compose-down`. Only the standard library."""
