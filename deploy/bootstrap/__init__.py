"""What `make up` does before anything runs: system packages, virtual environments, Triton.

Only the standard library, and idempotent: a step whose result is there is skipped.
"""
