"""Models of a lower precision: their comparison with the original, and what their file says about it."""
