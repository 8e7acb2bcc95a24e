"""Requests as rows or columns: the forms of TensorFlow Serving, KServe v1, SageMaker and others."""
