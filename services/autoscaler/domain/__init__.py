"""Decisions and values, without I/O and without a clock."""
