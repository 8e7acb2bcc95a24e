"""``tidegate import``: models of other systems, as versions of Tidegate."""
