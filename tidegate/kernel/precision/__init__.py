"""Compare a lower-precision model with its original.

The file of the lower-precision model also contains the recipe: the method that lowered the precision.
"""
