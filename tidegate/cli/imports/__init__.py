"""``tidegate import``: register models of other systems as versions in Tidegate."""
