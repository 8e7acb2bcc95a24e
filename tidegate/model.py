"""Names for a model's file: ``Tensor`` annotates arrays, and ``batched`` lets requests share a call.

    import numpy as np
    from tidegate import Tensor, batched

    @batched(max_size=32)
    def predict(x: Tensor["FP32", -1, 4]) -> Tensor["FP32", -1]:
        return x.sum(axis=1)

These names do not change the functions, so the file can be run and tested without Tidegate's services.
Tidegate reads the annotations from the source (:mod:`tidegate.kernel.protocol.python_model`). The worker puts
a copy of this module beside the model, because the model's Python does not have Tidegate. So this module
imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, overload

__all__ = ["Tensor", "batched"]

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
)  # fmt: skip
"""The datatypes that numpy has. BF16 is missing: numpy cannot hold it."""

DEFAULT_MAX_SIZE = 32

F = TypeVar("F", bound=Callable[..., Any])


class Tensor:
    """The datatype and the shape of an array that ``predict`` gets or returns; -1 means any size.

    Write the annotation as ``Tensor["FP32", -1, 4]``, or as ``Annotated[np.ndarray, Tensor("FP32", -1, 4)]``
    for a type checker. Instead of the datatype's name, the annotation can have a type of numpy or Python:
    ``Tensor[np.float32, -1, 4]``, ``Tensor[str, -1]`` (BYTES, decoded to str), ``Tensor[bytes, -1]``.
    """

    def __init__(self, datatype: Any, *shape: int) -> None:
        """Raise TypeError for an unknown datatype or an invalid shape."""
        if isinstance(datatype, str) and datatype not in DATATYPES:
            raise TypeError(f"unknown datatype {datatype!r}: expected one of {', '.join(DATATYPES)}")
        if not all(isinstance(dim, int) and dim >= -1 for dim in shape):
            raise TypeError(f"the shape {shape} is not a list of sizes: whole numbers, -1 for any size")
        self.datatype = datatype
        self.shape = shape

    def __class_getitem__(cls, item: Any) -> Any:
        """Return ``Annotated[Any, Tensor(...)]``, so that ``Tensor[...] | None`` is a valid annotation."""
        parts = item if isinstance(item, tuple) else (item,)
        return Annotated[Any, cls(*parts)]

    def __repr__(self) -> str:
        """Return the annotation as Python code."""
        return f"Tensor[{', '.join(map(repr, (self.datatype, *self.shape)))}]"


@overload
def batched(function: F, /) -> F: ...


@overload
def batched(*, max_size: int = DEFAULT_MAX_SIZE) -> Callable[[F], F]: ...


def batched(function: F | None = None, /, *, max_size: int = DEFAULT_MAX_SIZE) -> F | Callable[[F], F]:
    """Let one call of ``predict`` get the rows of several requests, stacked along the first axis.

    A call gets at most ``max_size`` rows. ``predict`` must return as many rows as it got. If it raises, each
    request of the call is retried alone, so that only the request at fault fails.
    """
    if max_size < 1:
        raise ValueError(f"max_size is {max_size}; it must be at least 1")

    def marked(found: F) -> F:
        found.__tidegate_batched__ = max_size  # type: ignore[attr-defined]
        return found

    return marked if function is None else marked(function)
