"""A model that takes its time: it sleeps the largest of ``ms`` (milliseconds) and gives ``ms`` back."""

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """A batch costs as much as its slowest row, as on a GPU that is not full. Negative ``ms`` are refused."""

    def execute(self, requests):
        """Answer the requests; what one of them does wrong is an error of its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        ms = pb_utils.get_input_tensor_by_name(request, "ms").as_numpy()
        if ms.min() < 0:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"ms must be at least 0, not {ms.min():g}")
            )
        time.sleep(float(ms.max()) / 1000)
        return pb_utils.InferenceResponse([pb_utils.Tensor("slept", ms)])
