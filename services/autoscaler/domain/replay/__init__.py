"""Replay arrivals: the real ``decide`` scales simulated replicas, to compare other policies."""
