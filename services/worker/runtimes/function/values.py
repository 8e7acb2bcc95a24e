"""Convert arrays to the arguments of ``predict``, and its result to arrays.

This file is copied beside the runtime, as ``tidegate_values.py``. It may import only numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def argument(array: Any, how: dict[str, Any]) -> Any:
    """Return an input in the form that ``predict`` expects: an array, a list, or one scalar.

    Raises UnicodeDecodeError for text that is not UTF-8.
    """
    if how["text"]:
        flat = [each.decode() if isinstance(each, bytes) else each for each in array.ravel()]
        texts = np.empty(len(flat), dtype=object)
        texts[:] = flat
        array = texts.reshape(array.shape)
    if how["kind"] == "list":
        return array.tolist()
    return array.item() if how["kind"] == "scalar" else array


class Outputs:
    """The outputs of a signature, each with ``name``, ``datatype`` and ``dims``.

    ``dims`` is the shape of the whole array, including the batch axis; -1 allows any size.
    """

    def __init__(self, specs: list[dict[str, Any]], numpy_type: Callable[[str], Any]) -> None:
        self.names = [spec["name"] for spec in specs]
        self._specs = specs
        self._types = {
            spec["name"]: np.dtype(
                object if spec["datatype"] == "BYTES" else numpy_type(f"TYPE_{spec['datatype']}")
            )
            for spec in specs
        }

    def named(self, result: Any, rows: int | None) -> dict[str, Any]:
        """Return the result of ``predict`` as a dict with an array for each output.

        ``rows`` is the number of rows that ``predict`` got; None: it got a single request. Raises TypeError
        or ValueError if the result does not fit the outputs.
        """
        values = self._values(result)
        return {
            spec["name"]: self._array(spec, value, rows)
            for spec, value in zip(self._specs, values)  # noqa: B905
        }

    def _values(self, result: Any) -> list[Any]:
        if isinstance(result, dict):
            if set(result) != set(self.names):
                raise ValueError(
                    f"predict returned the outputs {sorted(map(str, result))}, "
                    f"but the signature has {self.names}"
                )
            return [result[name] for name in self.names]
        if all(name in getattr(result, "__dict__", ()) or name in _fields(result) for name in self.names):
            return [getattr(result, name) for name in self.names]
        if len(self.names) == 1:
            only = isinstance(result, tuple) and len(result) == 1
            return list(result) if only else [result]
        if isinstance(result, tuple | list) and len(result) == len(self.names):
            return list(result)
        count = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        raise ValueError(f"predict returned {count} for the outputs {self.names}: return a tuple or a dict")

    def _array(self, spec: dict[str, Any], value: Any, rows: int | None) -> Any:
        name, dims, expected = spec["name"], spec["dims"], self._types[spec["name"]]
        if value is None:
            raise TypeError(f"predict returned None for the output {name!r}: is a `return` missing?")
        if hasattr(value, "detach"):  # a torch tensor, which may be on a GPU or have a gradient
            value = value.detach().cpu().numpy()
        array = _texts(name, value) if expected.kind == "O" else _cast(spec, np.asarray(value), expected)
        if array.ndim == 0 and dims in ([1], [-1]):
            array = array.reshape(1)
        if len(dims) != array.ndim or any(d not in (-1, n) for d, n in zip(dims, array.shape)):  # noqa: B905
            raise ValueError(
                f"predict returned the shape {list(array.shape)} for the output {name!r}, but the signature "
                f"says {dims}"
            )
        if rows is not None and array.shape[0] != rows:
            raise ValueError(f"predict got {rows} rows and returned {array.shape[0]} for the output {name!r}")
        return array


def _fields(result: Any) -> tuple[str, ...]:
    return tuple(getattr(result, "_fields", ()))


def _texts(name: str, value: Any) -> Any:
    array = np.asarray(value)
    # Convert a list directly to an array of objects. Numpy's fixed-width strings lose zero bytes at the end.
    array = array.astype(object) if isinstance(value, np.ndarray) else np.asarray(value, dtype=object)
    wrong = next((each for each in array.ravel() if not isinstance(each, str | bytes)), None)
    if wrong is not None:
        raise TypeError(
            f"predict returned a {type(wrong).__name__} in the output {name!r}, which is BYTES: return str "
            "or bytes"
        )
    return array


def _cast(spec: dict[str, Any], array: Any, expected: Any) -> Any:
    """Convert an array to the output's type.

    Raise TypeError if the conversion would change the kind of the values, for example from float to integer.
    Also raise TypeError if an integer does not fit into the output's type.
    """
    if array.dtype == expected:
        return array
    both_whole = array.dtype.kind in "iu" and expected.kind in "iu"
    if both_whole or np.can_cast(array.dtype, expected, "same_kind"):
        cast = array.astype(expected)
        if not both_whole or np.array_equal(cast, array):
            return cast
    raise TypeError(
        f"predict returned {array.dtype} for the output {spec['name']!r}, but the signature says "
        f"{spec['datatype']}: convert it with .astype(np.{expected.name}), or correct the signature"
    )
