"""The gRPC API: Triton's ``inference.GRPCInferenceService`` and the standard health service."""
