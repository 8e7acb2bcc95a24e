"""Registry, autoscaler and router in one process, for small machines. Composes their apps, no more."""
