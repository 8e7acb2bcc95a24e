"""Doubles numbers. At 1000, it dies by a segmentation fault; at 2000, it waits until it is killed.

It writes its process id to the file that ``KILLER_MARK`` names, for the benchmark that kills it.
"""

import os
import signal
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils

SEGFAULT, MARK, GATE = 1000, 2000, 3000


class TritonPythonModel:
    """``x`` FP32[n, 1] to ``y``, twice that. A row of 3000 takes two seconds, so that requests queue."""

    def execute(self, requests):
        """Return one response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if (x == GATE).any():
            time.sleep(2)
        if (x == SEGFAULT).any():
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        if (x == MARK).any():
            Path(os.environ["KILLER_MARK"]).write_text(str(os.getpid()))
            time.sleep(60)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)])
