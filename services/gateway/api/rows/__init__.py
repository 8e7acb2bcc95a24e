"""The APIs of other systems for tensors: TensorFlow Serving, KServe v1, TorchServe, SageMaker, Azure ML."""
