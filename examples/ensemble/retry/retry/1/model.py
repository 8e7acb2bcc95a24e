"""A model that calls another one, and calls it again with smaller numbers if it fails."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model whose second call depends on the result of the first. An ensemble cannot express that."""

    def execute(self, requests):
        """Return one response for each request."""
        return [self._one(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def _one(self, x):
        response = self._call(x)
        if response.has_error():
            response = self._call(np.minimum(x, np.float32(10)))
        if response.has_error():
            return pb_utils.InferenceResponse([], pb_utils.TritonError(response.error().message()))
        y = pb_utils.get_output_tensor_by_name(response, "y").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])

    def _call(self, x):
        request = pb_utils.InferenceRequest(
            model_name="limited", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", x)]
        )
        return request.exec()
