"""Profiles of sampled requests: columns, their bins, and the counts by bin. Pure."""
