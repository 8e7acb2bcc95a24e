"""The installation that `make up` begins with: system packages, virtual environments, Triton.

It needs only the standard library. It is idempotent: a step whose result is there is skipped.
"""
