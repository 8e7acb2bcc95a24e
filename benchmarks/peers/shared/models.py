"""The three models for the Python peers. This file is on the import path of every peer's server."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime

IMAGE_SHAPE = (3, 224, 224)


def port() -> int:
    """Return the loopback port that the benchmark assigns to the server."""
    return int(os.environ["BENCH_PORT"])


def digits_session() -> Any:
    """Return the digits model on one thread that does not spin, like in Tidegate."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        os.environ["BENCH_DIGITS"], options, providers=["CPUExecutionProvider"]
    )


def run_digits(session: Any, image: Any) -> tuple[Any, Any]:
    """Return ``label`` INT64[n] and ``probabilities`` FP32[n, 10] of images FP32[n, 64]."""
    label, probabilities = session.run(["label", "probabilities"], {"image": image})
    return label, probabilities


def image_of(body: bytes) -> Any:
    """Return an image FP32[3, 224, 224] from its raw bytes, without a copy."""
    return np.frombuffer(body, np.float32).reshape(IMAGE_SHAPE)


def mean_of(image: Any) -> float:
    """Return the image model's output."""
    return float(image.mean(dtype=np.float32))
