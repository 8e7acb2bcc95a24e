"""Profiles of sampled requests: columns, bins, and counts that can be added up. Pure."""
