"""Files that `tidegate import` copies into a model's folder. They run in the models' Python environment."""
