"""Models of a lower precision: the comparison with the original model, and the recipe in the model's file."""
