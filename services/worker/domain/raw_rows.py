"""Write sampled rows as lines of JSON, for Deployments that keep raw rows. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import orjson

from services.worker.domain.sample_tensors import counted_rows
from services.worker.domain.samples import SampledCall
from tidegate.kernel.profiles.columns import SampledTensor, as_table
from tidegate.kernel.protocol.tensors import unpack_strings
from tidegate.kernel.protocol.trace_context import detached

# If a row of a tensor has more elements than this, the tensor is listed without its values.
MAX_ELEMENTS = 1024
# If the strings in a row of a tensor have more bytes than this, they are not listed. Callers choose the
# length of strings, so a row could be very large.
MAX_STRING_BYTES = 16 * 1024


class SampledRow(NamedTuple):
    """A row that is counted in the profile. ``at``: seconds since the epoch.

    ``trace`` and ``request_rows``: the trace and the number of rows of the request to which the row belongs.
    """

    trace: bytes
    request_rows: int
    at: float


def rows_of(calls: Sequence[SampledCall]) -> list[SampledRow]:
    """Return the rows of ``calls`` that the profile counts, in the order of the calls."""
    found: list[SampledRow] = []
    for call in calls:
        rows = [
            SampledRow(trace, count, call.at) for trace, count in call.requests for _ in range(count or 1)
        ]
        found += rows[: counted_rows(call)]
    return found


def raw_lines(
    rows: Sequence[SampledRow],
    inputs: Sequence[SampledTensor],
    outputs: Sequence[SampledTensor],
    redact: Collection[str],
    limit: int,
) -> list[bytes]:
    """Return up to ``limit`` rows as lines of JSON. Tensors in ``redact`` have the value null."""
    wanted = min(limit, len(rows))
    sides = {
        "inputs": {each.name: _values(each, len(rows), wanted, redact) for each in inputs},
        "outputs": {each.name: _values(each, len(rows), wanted, redact) for each in outputs},
    }
    lines = []
    for at, row in enumerate(rows[:wanted]):
        document: dict[str, Any] = {"at": round(row.at, 3), "request_id": _request_id(row.trace)}
        for side, tensors in sides.items():
            document[side] = {name: values[at] for name, values in tensors.items()}
        lines.append(orjson.dumps(document) + b"\n")
    return lines


def _values(tensor: SampledTensor, rows: int, wanted: int, redact: Collection[str]) -> Sequence[Any]:
    if tensor.name in redact:
        return [None] * wanted
    if tensor.datatype == "BYTES":
        strings = unpack_strings(tensor.raw)
        width = max(1, len(strings) // rows)
        return [_texts(tensor, strings[at * width : (at + 1) * width]) for at in range(wanted)]
    table = as_table(tensor, rows)
    if table.shape[1] > MAX_ELEMENTS:
        return [_omitted(tensor)] * wanted
    found: list[Any] = table[:wanted].tolist()
    return found


def _texts(tensor: SampledTensor, strings: Sequence[bytes]) -> Any:
    if len(strings) > MAX_ELEMENTS or sum(map(len, strings)) > MAX_STRING_BYTES:
        return _omitted(tensor)
    return [each.decode(errors="replace") for each in strings]


def _omitted(tensor: SampledTensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "values": "omitted"}


def _request_id(trace: bytes) -> str:
    return detached(trace)[0].decode("latin-1")
