"""Measure the throughput and latency of a model's batching: settings to try, load, curve, picture."""
