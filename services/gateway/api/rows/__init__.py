"""The APIs of other model servers for tensors: TensorFlow Serving, KServe v1, TorchServe and others."""
