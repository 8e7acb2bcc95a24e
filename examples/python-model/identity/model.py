"""The smallest Python model: ``y`` is ``x``."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Triton calls ``execute`` with a list of requests and wants one response for each, in order."""

    def execute(self, requests):
        """Give every request its input back."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
