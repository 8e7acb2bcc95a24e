"""Compare a lower-precision model with its original, and store the recipe in the model's file."""
