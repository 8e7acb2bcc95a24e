"""Doubles numbers after a random time, and stalls in the process that gets a large number."""

import os
import random
import time

import numpy as np

TIME_MS = float(os.environ.get("FAULTS_MS", "10"))
STALL_MS = 300.0
# A process that gets this number takes STALL_MS longer for each later call, like one with a damaged state.
STALLS_AT = 1000.0

stalled = False


def predict(x: np.ndarray) -> np.ndarray:
    """Return twice the input, FP32[n]."""
    global stalled
    stalled = stalled or bool(x.max() >= STALLS_AT)
    time.sleep((random.lognormvariate(0, 0.3) * TIME_MS + STALL_MS * stalled) / 1e3)
    return x * 2
