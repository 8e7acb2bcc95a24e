"""Ids of requests, as callers send them."""

LONGEST_ID = 128
"""Characters; the rest is cut off."""
