"""The autoscaler: holds every Deployment at the replicas it needs."""
