"""HTTP doors for operators."""
