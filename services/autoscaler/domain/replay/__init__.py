"""Simulate scaling policies: the real ``decide`` controls simulated replicas in simulated time."""
