"""Measuring what a model's batching costs and brings: settings to try, load, curve, picture."""
