"""Doubles numbers, and dies of some: 1000 by a segmentation fault, 2000 when somebody kills it meanwhile.

Whoever is to kill it finds the process id in the file that ``KILLER_MARK`` names.
"""

import os
import signal
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils

SEGFAULT, MARK, GATE = 1000, 2000, 3000


class TritonPythonModel:
    """``x`` FP32[n, 1] to ``y``, twice that. A row of 3000 takes two seconds: meanwhile others gather."""

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
