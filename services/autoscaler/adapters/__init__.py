"""The outside world: processes, the registry, the files the autoscaler keeps."""
