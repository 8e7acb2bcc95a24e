"""Compare the answers of two models to one request, output by output. Pure.

Numbers agree within a tolerance. For rows of scores, the class with the largest score is compared too.
Strings agree if they are equal. For strings that differ, the edit distance is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from services.gateway.domain.edit_distance import edit_distance
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.shadow import OutputCounts
from tidegate.kernel.protocol.tensors import to_json, unpack_strings

# For each output, compute the edit distance of at most EDITED differing strings, because this takes long.
# Skip strings longer than EDITED_CHARS.
EDITED = 4
EDITED_CHARS = 2000
_FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})


class Output(NamedTuple):
    """An output of an answer.

    ``tensor``: its name, datatype, and shape without the batch axis. ``rows``: its number of rows; 0 if it
    has no batch axis.
    """

    tensor: Tensor
    rows: int
    raw: Buffer

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape with the batch axis."""
        return (self.rows, *self.tensor.dims) if self.rows else self.tensor.dims


class Comparison(NamedTuple):
    """The result of the comparison of one output.

    ``difference``: a text that describes the difference; empty if the outputs agree.
    """

    name: str
    counts: OutputCounts
    difference: str


def compare(
    primary: Sequence[Output],
    shadow: Sequence[Output],
    atol: float,
    rtol: float,
    pause: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Compare the outputs of two answers. Outputs with the same name are compared with each other.

    Numbers a (primary) and b agree if abs(a - b) <= atol + rtol * abs(a). NaN agrees with NaN. ``pause`` is
    called often, so that other threads can run.
    """
    theirs = {each.tensor.name: each for each in shadow}
    mine = {each.tensor.name: each for each in primary}
    found = []
    for name in dict.fromkeys([*mine, *theirs]):
        pause()
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None:
            missing = (
                "the shadow's answer does not have this output"
                if b is None
                else "only the shadow's answer has this output"
            )
            found.append(_unlike(name, missing))
        elif (a.tensor.datatype, a.shape) != (b.tensor.datatype, b.shape):
            found.append(_unlike(name, f"{_kind(b)} instead of {_kind(a)}"))
        elif a.tensor.datatype.name == "BYTES":
            found.append(_texts(name, unpack_strings(a.raw), unpack_strings(b.raw), pause))
        else:
            found.append(_numbers(name, a, b, atol, rtol))
    return found


def _unlike(name: str, difference: str) -> Comparison:
    return Comparison(name, OutputCounts(compared=1, unlike=1), difference)


def _kind(output: Output) -> str:
    return f"{output.tensor.datatype.name} {list(output.shape)}"


def _numbers(name: str, a: Output, b: Output, atol: float, rtol: float) -> Comparison:
    counts = OutputCounts(compared=1)
    first, second = _values(a), _values(b)
    if a.tensor.datatype.name in _FLOATS and first.ndim and first.shape[-1] > 1 and first.ndim <= 2:
        same = np.argmax(first, -1) == np.argmax(second, -1)
        counts.rows, counts.top1 = int(same.size), int(same.sum())
    if bytes(a.raw) == bytes(b.raw):
        counts.agreed = 1
        return Comparison(name, counts, "")
    with np.errstate(all="ignore"):
        # Convert the values to floats first, because a difference of unsigned or 64-bit integers can
        # overflow. A float64 represents integers exactly up to 2**53.
        one, other = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
        distance = np.abs(one - other)
        distance[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
        distance[np.isnan(distance)] = np.inf
        bad = (distance > 0) & ~((distance <= atol + rtol * np.abs(one)) & np.isfinite(distance))
        relative = distance / np.maximum(np.abs(one), np.finfo(np.float32).tiny)
    counts.max_abs, counts.max_rel = _finite(distance.max()), _finite(relative.max())
    if not bad.any():
        counts.agreed = 1
        return Comparison(name, counts, "")
    at = int(np.argmax(np.where(bad, distance, -1.0)))
    words = f"{int(bad.sum())} of {bad.size} values differ, at most by {distance[at]:.3g} (element {at})"
    return Comparison(name, counts, words)


def _values(output: Output) -> np.ndarray:
    values: np.ndarray = to_json(output.tensor.datatype, bytes(output.raw))
    return values.reshape(output.shape)


def _finite(value: float) -> float:
    """Return a number that JSON can represent."""
    return float(min(value, 1e300))


def _texts(name: str, a: Sequence[bytes], b: Sequence[bytes], pause: Callable[[], None]) -> Comparison:
    counts = OutputCounts(compared=1, texts=len(a))
    differ = [(one, other) for one, other in zip(a, b, strict=True) if one != other]
    counts.exact = len(a) - len(differ)
    if not differ:
        counts.agreed = 1
        return Comparison(name, counts, "")
    for one, other in differ[:EDITED]:
        first, second = one.decode("utf-8", "replace"), other.decode("utf-8", "replace")
        if max(len(first), len(second)) <= EDITED_CHARS:
            counts.edited += 1
            counts.edits += edit_distance(first, second, pause) / max(len(first), len(second), 1)
    words = f"{len(differ)} of {len(a)} strings differ"
    if counts.edited:
        words += f", edit distance {counts.edits / counts.edited:.0%}"
    return Comparison(name, counts, words)
