"""Split one batched answer into the answers of its requests."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import DATATYPES, elements, string_offsets
from tidegate.kernel.protocol.usage import TOKEN_COUNTS, is_count


class Output(NamedTuple):
    """An output tensor as the model server returned it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: Buffer


class RowMismatch(ValueError):
    """Error for outputs that cannot be divided among the requests of their call."""


def describe(outputs: list[Output], rows: int) -> tuple[int, tuple[Tensor, ...]]:
    """Return the number of rows of an answer, and its tensors. If it has no batch axis, the number is 0."""
    batched = rows > 0 and all(output.shape and output.shape[0] == rows for output in outputs)
    first = 1 if batched else 0
    tensors = tuple(Tensor(o.name, DATATYPES[o.datatype], o.shape[first:]) for o in outputs)
    return (rows if batched else 0), tensors


def split(outputs: list[Output], parts: list[int]) -> list[list[Buffer]]:
    """Return for each request its slice of every output. ``parts``: the number of rows of each request.

    Raises RowMismatch if the length of an output's first axis is not the sum of ``parts``, or if an output is
    malformed.
    """
    rows = sum(parts)
    answers: list[list[Buffer]] = [[] for _ in parts]
    for output in outputs:
        if not output.shape or output.shape[0] != rows:
            raise RowMismatch(
                f"output {output.name!r} has shape {list(output.shape)} for {rows} rows of input"
            )
        view = memoryview(output.raw)
        ends = _row_ends(output, rows)
        at = row = 0
        for answer, part in zip(answers, parts, strict=True):
            row += part
            end = ends[row - 1] if isinstance(ends, list) else row * ends
            answer.append(view[at:end])
            at = end
    return answers


def split_parameters(parameters: dict[str, Any], parts: list[int]) -> list[dict[str, Any]]:
    """Return the parameters of a call's answer for each of its requests.

    ``parts``: the number of rows of each request. Each request gets all parameters. Only the token counts are
    divided, in proportion to the rows, and their sum stays exact. Otherwise all tokens of the call would be
    counted for each request.
    """
    if len(parts) == 1:
        return [parameters]
    counts = {name: parameters[name] for name in TOKEN_COUNTS if is_count(parameters.get(name))}
    rows, before, divided = sum(parts), 0, []
    for part in parts:
        after = before + part
        shares = {name: count * after // rows - count * before // rows for name, count in counts.items()}
        divided.append(parameters | shares)
        before = after
    return divided


def _row_ends(output: Output, rows: int) -> list[int] | int:
    """Return the bytes per row. If elements vary in size, return the offset at which each row ends."""
    if DATATYPES[output.datatype].size:
        return len(output.raw) // rows
    per_row = elements(list(output.shape[1:]))
    if not per_row:
        return [0] * rows
    try:
        ends = string_offsets(output.raw, per_row)
    except (ValueError, struct.error) as error:
        raise RowMismatch(f"output {output.name!r} holds malformed BYTES: {error}") from None
    if len(ends) != rows:
        raise RowMismatch(
            f"output {output.name!r} has fewer elements than its shape {list(output.shape)} says"
        )
    return ends
