"""The installation at the start of `make up`: system packages, virtual environments, Triton.

It needs only the standard library. It can be repeated, because it skips steps that are done.
"""
