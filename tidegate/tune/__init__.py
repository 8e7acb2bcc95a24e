"""Measure throughput and latency of a model with several batching settings, and choose the best one."""
