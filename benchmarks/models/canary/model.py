"""Doubles numbers after a random time. The environment sets the time, and the part of the calls that fail."""

import os
import random
import time

import numpy as np

TIME_MS = float(os.environ.get("CANARY_MS", "10"))
FAILS = float(os.environ.get("CANARY_FAILS", "0"))


def predict(x: np.ndarray) -> np.ndarray:
    """Return twice the input, FP32[n]."""
    time.sleep(random.lognormvariate(0, 0.3) * TIME_MS / 1e3)
    if random.random() < FAILS:
        raise ValueError("this version fails at random")
    return x * 2
