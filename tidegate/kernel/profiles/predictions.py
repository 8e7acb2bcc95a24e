"""Read labels, confidences and scores from a model's outputs. Pure.

A model does not declare the meaning of its outputs. This module guesses the meaning from the outputs'
datatypes, widths and values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tidegate.kernel.profiles.columns import Columns, Numbers, SampledTensor, add_tensor, as_table
from tidegate.kernel.protocol.tensors import unpack_strings

MAX_CLASSES = 1000
# Sums of 32-bit probabilities differ from 1 by less than this.
TOLERANCE = 0.01
# A numeric output whose rows have more elements than this gets no columns in a profile, because counting them
# would take too long.
MAX_OUTPUTS = 16

PREDICTION, CONFIDENCE, SCORE = "prediction", "confidence", "score"


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of some rows.

    ``labels``: the predicted classes. ``confidence``: their probabilities. ``scores``: the probability of the
    second of two classes, or the predicted number.
    """

    labels: list[str] | None = None
    confidence: Numbers | None = None
    scores: Numbers | None = None


def read_predictions(outputs: Sequence[SampledTensor], rows: int) -> Predictions:
    """Return the predictions in a model's outputs. Raise ValueError if an output does not fit its shape.

    A string or an integer is a label. Several floats from 0 to 1 with the sum 1 are probabilities. A single
    float is a predicted number.
    """
    labels: list[str] | None = None
    confidence: Numbers | None = None
    scores: Numbers | None = None
    for output in outputs:
        width = int(np.prod(output.shape, dtype=np.int64))
        if width == 1 and labels is None and not _is_float(output):
            labels = _labels(output, rows)
        elif _is_float(output) and 2 <= width <= MAX_CLASSES and confidence is None:
            table = as_table(output, rows)
            if _are_probabilities(table):
                confidence = table.max(axis=1)
                labels = labels or [str(each) for each in table.argmax(axis=1).tolist()]
                scores = table[:, 1] if width == 2 else scores
        elif _is_float(output) and width == 1 and scores is None:
            scores = as_table(output, rows)[:, 0]
    return Predictions(labels, confidence, scores)


def add_outputs(
    columns: Columns, outputs: Sequence[SampledTensor], redact: Collection[str] = ()
) -> Predictions:
    """Add the columns of a model's outputs, and return its predictions.

    Strings and integers of the outputs in ``redact`` are not used as labels, because a profile stores labels
    as plain text.
    """
    shown = [each for each in outputs if each.name not in redact or _is_float(each)]
    found = read_predictions(shown, columns.rows)
    if found.labels is not None:
        columns.values[PREDICTION] = list(found.labels)
    if found.confidence is not None:
        columns.put(CONFIDENCE, found.confidence)
        if found.scores is not None:
            columns.put(SCORE, found.scores)
    elif found.scores is not None:
        columns.put(PREDICTION, found.scores)
    elif found.labels is None:
        for output in outputs:
            if int(np.prod(output.shape, dtype=np.int64)) <= MAX_OUTPUTS or output.datatype == "BYTES":
                add_tensor(columns, output, redact)
    return found


def _is_float(output: SampledTensor) -> bool:
    return output.datatype in ("FP16", "FP32", "FP64", "BF16")


def _labels(output: SampledTensor, rows: int) -> list[str] | None:
    if output.datatype != "BYTES":
        return [str(int(each)) for each in as_table(output, rows)[:, 0].tolist()]
    strings = unpack_strings(output.raw)
    if len(strings) != rows or any(len(each) > 64 for each in strings):
        return None  # a long text is not a label
    return [each.decode(errors="replace") for each in strings]


def _are_probabilities(table: Numbers) -> bool:
    return bool(
        len(table)
        and (table >= -TOLERANCE).all()
        and (table <= 1 + TOLERANCE).all()
        and (np.abs(table.sum(axis=1) - 1) <= TOLERANCE).all()
    )
