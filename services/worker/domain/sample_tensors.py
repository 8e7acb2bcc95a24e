"""Join the tensors of sampled calls, so that many rows are counted together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from services.worker.domain.samples import CALL_ROWS, SampledCall
from tidegate.kernel.profiles.columns import SampledTensor
from tidegate.kernel.protocol.envelope import Buffer, read_call_key
from tidegate.kernel.protocol.tensors import DATATYPES, string_offsets


def alike(calls: Iterable[SampledCall]) -> list[list[SampledCall]]:
    """Group the calls with equal call keys and output shapes, so that their tensors can be joined."""
    groups: dict[object, list[SampledCall]] = {}
    for call in calls:
        first = 1 if call.batched else 0
        outputs = tuple((each.name, each.datatype, tuple(each.shape[first:])) for each in call.outputs)
        groups.setdefault((call.key, call.batched, outputs), []).append(call)
    return list(groups.values())


def counted_rows(call: SampledCall) -> int:
    """Return how many rows of a call the profile counts. A call without a batch axis has one row."""
    return min(call.rows, CALL_ROWS)


def joined_inputs(calls: Sequence[SampledCall]) -> list[SampledTensor]:
    """Return the joined inputs of calls with equal keys. Raise ValueError if a tensor is malformed."""
    key = read_call_key(calls[0].key)
    return [
        _joined(
            (tensor.name, tensor.datatype.name, tensor.dims),
            [(b"".join(call.inputs[at]), call) for call in calls],
        )
        for at, tensor in enumerate(key.inputs)
    ]


def joined_outputs(calls: Sequence[SampledCall]) -> list[SampledTensor]:
    """Return the joined outputs of calls with equal keys.

    Leave out an output if its number of rows differs from its call's. Raise ValueError if a tensor is
    malformed.
    """
    found = []
    for at, output in enumerate(calls[0].outputs):
        batched = calls[0].batched
        if batched and any(
            not call.outputs[at].shape or call.outputs[at].shape[0] != call.rows for call in calls
        ):
            continue
        shape = tuple(output.shape[1:] if batched else output.shape)
        pieces = [(call.outputs[at].raw, call) for call in calls]
        found.append(_joined((output.name, output.datatype, shape), pieces))
    return found


def _joined(
    described: tuple[str, str, tuple[int, ...]], pieces: Sequence[tuple[Buffer, SampledCall]]
) -> SampledTensor:
    name, datatype, shape = described
    elements = prod(shape)
    raw = b"".join(_first_rows(raw, datatype, elements, counted_rows(call)) for raw, call in pieces)
    return SampledTensor(name, datatype, shape, raw)


def _first_rows(raw: Buffer, datatype: str, elements: int, rows: int) -> Buffer:
    """Return the bytes of the first ``rows`` rows of a tensor, or of all rows if it has fewer."""
    if size := DATATYPES[datatype].size:
        return memoryview(raw)[: rows * elements * size]
    ends = string_offsets(raw, max(1, elements))
    return memoryview(raw)[: ends[rows - 1]] if len(ends) > rows else raw
