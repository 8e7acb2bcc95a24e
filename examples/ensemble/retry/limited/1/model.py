"""A model that doubles numbers up to 10."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model that fails for larger numbers, so that its caller must react."""

    def execute(self, requests):
        """Return one response for each request."""
        return [
            self._double(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests
        ]

    def _double(self, x):
        if x.max() > 10:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"{x.max():g} is more than 10"))
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)])
