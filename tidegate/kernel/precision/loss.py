"""Compare the answers of a model of a lower precision with those of the original. Pure.

This file imports only numpy, because it also runs in the models' environment, where Tidegate is not
installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Measure = Literal["agreement", "cosine", "error"]
Arrays = Mapping[str, "np.ndarray[Any, Any]"]

_ROW_SUM_TOLERANCE = 1e-2
# If each row of an output has at least this many numbers, the output is an embedding. An exception is an
# output whose rows are probabilities.
_EMBEDDING = 16


def measure_of(outputs: Arrays, labels: bool) -> tuple[Measure, str]:
    """Return how to compare the answers, and the name of the output to compare.

    Classes and rows of probabilities are compared by agreement, which is the share of rows with the same
    class. If ``labels`` is True, all rows with more than one number are compared in this way. Otherwise long
    rows are compared by their cosine, and other numbers by their relative error.
    """
    for name, values in outputs.items():
        if values.dtype.kind in "iubSUO":
            return "agreement", name
    numbers = {name: values for name, values in outputs.items() if values.dtype.kind == "f"}
    for name, values in numbers.items():
        if values.ndim == 2 and values.shape[1] > 1 and (labels or _probabilities(values)):
            return "agreement", name
    for name, values in numbers.items():
        if values.ndim >= 2 and values.shape[-1] >= _EMBEDDING:
            return "cosine", name
    return "error", next(iter(numbers or outputs))


def _probabilities(values: np.ndarray[Any, Any]) -> bool:
    within = bool((values >= -_ROW_SUM_TOLERANCE).all() and (values <= 1 + _ROW_SUM_TOLERANCE).all())
    return within and bool((np.abs(values.sum(axis=1) - 1) < _ROW_SUM_TOLERANCE).all())


def classes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the class of each row.

    For a row of several scores, this is the index of the largest score. Otherwise the value is the class.
    """
    if values.dtype.kind == "f" and values.ndim > 1:
        picked: np.ndarray[Any, Any] = values.argmax(axis=-1)
        return picked
    return values.reshape(len(values), -1)


def likeness(measure: Measure, expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Return how similar two outputs are: 1.0 means equal.

    For the measure ``error``, the result is 1 - relative error.
    """
    if expected.shape != actual.shape:
        return 0.0
    if measure == "agreement":
        same = classes(expected) == classes(actual)
        return float(np.asarray(same).reshape(len(expected), -1).all(axis=1).mean())
    wanted, found = expected.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(found).all():
        return 0.0
    if measure == "cosine":
        wanted, found = wanted.reshape(-1, wanted.shape[-1]), found.reshape(-1, found.shape[-1])
        sizes = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
        products = (wanted * found).sum(axis=1)
        return float(
            np.where(sizes > 0, products / np.maximum(sizes, 1e-30), wanted.sum(1) == found.sum(1)).mean()
        )
    size = float(np.linalg.norm(wanted))
    return 1.0 - min(1.0, float(np.linalg.norm(wanted - found)) / size) if size else float(not found.any())


def sqnr_db(expected: Arrays, actual: Arrays) -> float | None:
    """Return the ratio of signal to quantisation noise over all numbers, in dB.

    Return None if there is no noise, or if the noise is not finite.
    """
    signal = noise = 0.0
    for name, values in expected.items():
        if values.dtype.kind == "f" and values.shape == actual[name].shape:
            wanted = values.astype(np.float64)
            signal += float((wanted**2).sum())
            noise += float(((wanted - actual[name]) ** 2).sum())
    if noise == 0 or not math.isfinite(noise):
        return None
    return 10 * math.log10(max(signal, 1e-30) / noise)
