"""Encode answers as rows or columns of JSON, as TensorFlow Serving does."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import to_json, unpack_strings

# The largest number of rows that are encoded as objects or lines. More would block the event loop too long.
MOST_ROWS = 2**19


def arrays(outputs: Sequence[Tensor], data: Sequence[Buffer], rows: int) -> dict[str, np.ndarray]:
    """Return the outputs by name. ``rows``: the length of their batch axis; 0: they have no batch axis.

    Strings become ``str``; strings that are not UTF-8 become ``{"b64": "..."}``.
    """
    found = {}
    for tensor, raw in zip(outputs, data, strict=True):
        shape = (rows, *tensor.dims) if rows else tensor.dims
        if tensor.datatype.name == "BYTES":
            values = np.empty(math.prod(shape), dtype=object)
            values[:] = [_text(each) for each in unpack_strings(raw)]
        else:
            values = np.asarray(to_json(tensor.datatype, raw))
        found[tensor.name] = values.reshape(shape)
    return found


def columns(found: dict[str, np.ndarray]) -> Any:
    """Return an object of outputs by name; a single output is returned without its name."""
    values = {name: each.tolist() for name, each in found.items()}
    return next(iter(values.values())) if len(values) == 1 else values


def as_rows(found: dict[str, np.ndarray]) -> list[Any]:
    """Return a list with an element for each row.

    Each element is the row's only output, or an object of the row's outputs by name. Raise BadRequest if the
    outputs have no rows, different numbers of rows, or too many rows.
    """
    sizes = {each.shape[0] if each.ndim else -1 for each in found.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise BadRequest("the outputs of this model are not rows: send 'inputs' instead of 'instances'")
    if len(found) > 1:
        check_rows(found)
    lists = {name: each.tolist() for name, each in found.items()}
    if len(lists) == 1:
        return list(next(iter(lists.values())))
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def check_rows(found: dict[str, np.ndarray]) -> None:
    """Raise BadRequest if an answer has too many rows to encode them one by one."""
    rows = max((each.shape[0] for each in found.values() if each.ndim), default=0)
    if rows > MOST_ROWS:
        raise BadRequest(
            f"the answer has {rows} rows, but this form allows at most {MOST_ROWS}: send fewer rows, or use "
            "/v2/models/NAME/infer"
        )


def _text(raw: bytes) -> str | dict[str, str]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(raw).decode()}


def scores(found: dict[str, np.ndarray]) -> np.ndarray:
    """Return the class scores: the first output of floats with the shape [rows, classes]."""
    for each in found.values():
        if each.ndim == 2 and each.dtype.kind == "f":
            return each
    raise BadRequest("this model has no output with a score for each class: use predict")


def numbers(found: dict[str, np.ndarray]) -> list[float]:
    """Return one number for each row: the first output with exactly one number per row."""
    for each in found.values():
        if each.dtype.kind in "fiu" and each.ndim and each.size == each.shape[0]:
            return [float(value) for value in each.ravel()]
    raise BadRequest("this model has no output with one number for each row: use predict")
