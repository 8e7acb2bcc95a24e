"""A slow model: it sleeps the largest value of ``ms`` (milliseconds) and returns ``ms``."""

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A model whose batch takes as long as its slowest row, as on a GPU that is not full."""

    def execute(self, requests):
        """Return one response for each request. A negative ``ms`` is an error of its request only."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        ms = pb_utils.get_input_tensor_by_name(request, "ms").as_numpy()
        if ms.min() < 0:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"ms must be at least 0, not {ms.min():g}")
            )
        time.sleep(float(ms.max()) / 1000)
        return pb_utils.InferenceResponse([pb_utils.Tensor("slept", ms)])
