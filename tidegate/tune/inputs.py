"""Make the inputs of the request that a measurement sends. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tidegate.client.codec import Array, Tensor, dtype_of


def zeros(signature: Mapping[str, Any]) -> dict[str, Array]:
    """Return one row of zeros or empty strings for each required input.

    A dimension without a fixed size becomes 1.
    """
    batched = bool(signature["max_batch_size"])
    found = {}
    for spec in signature["inputs"]:
        if spec.get("optional"):
            continue
        shape = [1] * batched + [1 if size < 0 else size for size in spec["shape"]]
        datatype = spec["datatype"]
        found[spec["name"]] = (
            np.full(shape, b"", dtype=object) if datatype == "BYTES" else np.zeros(shape, dtype_of(datatype))
        )
    return found


def rows_of(tensors: list[Tensor], max_batch_size: int) -> int:
    """Return the number of rows along the batch axis; 1 for a model without a batch axis."""
    if not max_batch_size or not tensors or not tensors[0].array.ndim:
        return 1
    return max(1, int(tensors[0].array.shape[0]))
