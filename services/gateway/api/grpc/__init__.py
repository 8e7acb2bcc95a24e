"""The gRPC door: Triton's ``inference.GRPCInferenceService``, and the standard health service."""
