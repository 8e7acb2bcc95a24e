"""Simulate other policies: arrivals, a queue and replicas in simulated time, under the real ``decide``."""
