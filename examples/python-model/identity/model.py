"""The smallest Python model: ``y`` is ``x``."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model for Triton, which calls ``execute`` with requests and expects their responses in order."""

    def execute(self, requests):
        """Return the input of each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
