"""The autoscaler: the service that starts and ends the replicas of all Deployments."""
