"""The tensor APIs of other model servers: TensorFlow Serving, KServe v1, TorchServe and others."""
