"""Decisions and values, without I/O and clock."""
