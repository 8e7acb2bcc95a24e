"""Registry, autoscaler and router in one process, for small machines."""
