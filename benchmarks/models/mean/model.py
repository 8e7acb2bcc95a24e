"""The mean of an image. It computes almost nothing, so the benchmark measures the transport of 600 KB."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """``image`` FP32[n, 3, 224, 224] to ``mean`` FP32[n, 1]."""

    def execute(self, requests):
        """Return one response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        mean = image.reshape(len(image), -1).mean(axis=1, keepdims=True, dtype=np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("mean", mean)])
