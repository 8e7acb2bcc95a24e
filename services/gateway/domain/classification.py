"""The classification extension: return only the highest values of an output, as ``value:index[:label]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.domain.contract import Decoded
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import DATATYPES, elements, pack_strings

# As in Triton, half floats and datatypes that are not numbers have no classes.
_UNFIT = frozenset({"BOOL", "BYTES", "FP16", "BF16"})

Labels = Mapping[str, Sequence[str]]


def classified(
    request: Decoded, rows: int, outputs: tuple[Tensor, ...], data: list[Buffer], labels: Labels
) -> tuple[tuple[Tensor, ...], list[Buffer]]:
    """Return the outputs. If the request wants classes for an output, the classes replace its values.

    ``labels``: the class names by output. Raise BadRequest if classes are wanted for an output whose datatype
    does not support them.
    """
    wanted = {output.name: output.classes for output in request.wanted or () if output.classes}
    if not wanted:
        return outputs, data
    shown, raws = list(outputs), list(data)
    for at, tensor in enumerate(outputs):
        if count := wanted.get(tensor.name):
            shown[at], raws[at] = top(tensor, rows, data[at], count, labels.get(tensor.name, ()))
    return tuple(shown), raws


def top(
    tensor: Tensor, rows: int, raw: Buffer, count: int, labels: Sequence[str] = ()
) -> tuple[Tensor, bytes]:
    """Return the ``count`` highest values of each row, each with its index and label. The highest is first.

    Without a batch axis, the whole output is one row. Raise BadRequest for a datatype that has no classes.
    """
    if tensor.datatype.name in _UNFIT:
        raise BadRequest(
            f"class result not available for output due to unsupported type {tensor.datatype.name!r}: output "
            f"{tensor.name!r}"
        )
    import numpy as np  # imported only here, because few requests need NumPy

    size = elements(list(tensor.dims))
    count = min(count, size)
    values: Any = np.frombuffer(raw, tensor.datatype.numpy).reshape(max(rows, 1), size)
    # The highest value comes first. Of equal values, the one with the lower index comes first. A stable
    # ascending sort of the reversed row has exactly the opposite order, so reverse its result.
    order = size - 1 - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    chosen = np.take_along_axis(values, order, axis=1)
    shown = "%f:%d" if tensor.datatype.name.startswith("FP") else "%d:%d"
    classes = [
        shown % pair + (f":{labels[pair[1]]}" if pair[1] < len(labels) else "")
        for pair in zip(chosen.ravel().tolist(), order.ravel().tolist(), strict=True)
    ]
    return Tensor(tensor.name, DATATYPES["BYTES"], (count,)), pack_strings(classes)
