"""The autoscaler: keeps each Deployment at the number of replicas that it needs."""
