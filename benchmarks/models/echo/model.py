"""Returns its input, of any size, so that a mixed-up answer can be detected."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """``x`` FP32[n, any] to ``y``, the same."""

    def execute(self, requests):
        """Return one response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
