"""Doubles numbers. Some numbers end the process, make it hang, or make it take memory up to its limit."""

import os
import time

import triton_python_backend_utils as pb_utils

EXIT, HANG, LEAK = 1000, 2000, 3000
STEP = 2**24


class TritonPythonModel:
    """``x`` FP32[n, 1] to ``y``, twice that."""

    def execute(self, requests):
        """Return one response for each request, in order."""
        time.sleep(float(os.environ.get("DEATHS_MODEL_MS", "0")) / 1e3)
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if (x == EXIT).any():
            os._exit(7)
        if (x == HANG).any():
            time.sleep(3600)
        if (x == LEAK).any():
            kept = []
            while True:
                kept.append(bytearray(os.urandom(1)) * STEP)
                time.sleep(0.01)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)])
