"""Install what `make up` needs: system packages, virtual environments, Triton.

This package needs only the standard library. The installation can be repeated, because it skips steps that
are done.
"""
