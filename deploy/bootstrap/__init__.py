"""The installation that `make up` begins with: system packages, virtual environments, Triton.

It needs only the standard library. It can be repeated: steps that are done are skipped.
"""
