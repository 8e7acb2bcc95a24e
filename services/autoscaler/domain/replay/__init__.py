"""Simulate other policies: the real ``decide`` scales replicas that exist only in simulated time."""
