"""Decode rows (a list with an element for each row) and columns (a list for each input), and check them.

Both forms are those of TensorFlow Serving's REST API. The datatype and the shape follow from the signature.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from services.gateway.domain.contract import Contract, Decoded, Inputs, inputs_unknown
from services.gateway.domain.generate import fitting
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.bounded_json import shown
from tidegate.kernel.protocol.tensors import MAX_STRINGS, from_json

B64 = "b64"
_MAX_DEPTH = 32
_NESTED = frozenset({list, dict})
# The features in a request's ``context`` are copied into each of its ``examples``. This is the largest total
# size of the copies, in bytes.
_MOST_REPEATED = 32 * 2**20


def from_rows(rows: Any, contract: Contract) -> Decoded:
    """Decode a request of rows.

    A row is the value of the only input, or an object of the inputs by name. Raise BadRequest if the rows are
    wrong. Raise Unavailable if the model's signature is not known.
    """
    known(contract)
    if not isinstance(rows, list) or not rows:
        raise BadRequest(f"expected a list with at least one row, got {shown(rows)}")
    names = list(contract.inputs)
    if not all(_is_named(row, contract) for row in rows):
        return from_columns({only(contract): rows}, contract)
    given = rows[0].keys()
    for at, row in enumerate(rows):
        if row.keys() != given:
            raise BadRequest(
                f"row {at} has the inputs {shown(sorted(row))}, but row 0 has {shown(sorted(given))}"
            )
    if unknown := sorted(given - contract.inputs.keys()):
        raise BadRequest(f"input {unknown[0]!r} does not exist; the model takes {names}")
    return from_columns({name: [row[name] for row in rows] for name in given}, contract)


def from_columns(columns: Any, contract: Contract) -> Decoded:
    """Decode a request of columns: an object of the inputs by name, or the value of the only input.

    If the model batches, the first axis of each value is the batch axis. Raise BadRequest if the columns are
    wrong. Raise Unavailable if the model's signature is not known.
    """
    known(contract)
    if not _is_named(columns, contract):
        columns = {only(contract): columns}
    inputs = Inputs(contract)
    for name, value in columns.items():
        if name not in contract.inputs:
            raise BadRequest(f"input {name!r} does not exist; the model takes {list(contract.inputs)}")
        tensor = contract.inputs[name][1]
        values = _Strings().plain(value) if tensor.datatype.name == "BYTES" else value
        shape = _shape(name, tensor.dims, values, batched=contract.max_batch > 0)
        datatype = inputs.expect(name, tensor.datatype.name, shape)
        inputs.put(from_json(name, datatype, shape, values if isinstance(values, list) else [values]))
    tensors, data, rows = inputs.done()
    return Decoded("", rows, contract.key(tensors, (), {}), data, None, False, None, 0)


def _shape(name: str, dims: tuple[int, ...], values: Any, *, batched: bool) -> list[int]:
    if not batched:
        return fitting(name, dims, values)
    if not isinstance(values, list) or not values:
        raise BadRequest(f"input {name!r}: expected a list with an element for each row, got {shown(values)}")
    return [len(values), *fitting(name, dims, values[0])]


def known(contract: Contract) -> None:
    """Raise Unavailable if the signature of the model is not known yet."""
    if contract.signature is None:
        raise inputs_unknown()


def only(contract: Contract) -> str:
    """Return the name of the only input that a request needs; raise BadRequest if it needs several."""
    names = list(contract.inputs)
    needed = [name for name in names if name in contract.required] or names
    if len(needed) != 1:
        first = names[0] if names else "NAME"
        raise BadRequest(f"the model takes the inputs {names}: name them, as in {{{first!r}: ...}}")
    return needed[0]


def examples(document: Mapping[str, Any], contract: Contract) -> Decoded:
    """Decode a request of ``examples``. The features of ``context`` are added to each example.

    Raise BadRequest if the examples are wrong, or if the copies of the context are too large. Raise
    Unavailable if the model's signature is not known.
    """
    found, context = document.get("examples"), document.get("context") or {}
    if not isinstance(found, list) or not isinstance(context, dict):
        raise BadRequest("the request must have 'examples', a list of objects of features")
    if context and len(found) > 1 and _is_larger(context, _MOST_REPEATED // len(found)):
        raise BadRequest(
            f"'context' is too large to be copied into each of {len(found)} examples: send fewer examples"
        )
    return from_rows([context | each if isinstance(each, dict) else each for each in found], contract)


def _is_larger(value: Any, most: int) -> bool:
    """Return True if a JSON value has more than about ``most`` bytes."""
    size, waiting = 0, [value]
    while waiting and size <= most:
        each = waiting.pop()
        size += 4 + (len(each) if isinstance(each, str) else 0)
        if isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return size > most


def _is_named(value: Any, contract: Contract) -> bool:
    """Return True for an object of inputs by name. ``{"b64": "..."}`` counts as one string, not as inputs."""
    return isinstance(value, Mapping) and (value.keys() != {B64} or B64 in contract.inputs)


class _Strings:
    """Decode the strings of an input. Their number is limited, because decoding blocks the event loop."""

    def __init__(self) -> None:
        self._left = 2 * MAX_STRINGS  # twice the limit, because nested lists count as elements, too

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Return the value with each ``{"b64": "..."}`` decoded to bytes.

        Raise BadRequest if the base64 is wrong, if there are too many elements, or if lists are nested too
        deep.
        """
        if isinstance(value, list):
            if depth > _MAX_DEPTH:
                raise BadRequest(f"lists are nested more than {_MAX_DEPTH} deep")
            self._left -= len(value)
            if self._left < 0:
                raise BadRequest(f"an input of strings may have at most {MAX_STRINGS} elements: send fewer")
            if _NESTED.isdisjoint(map(type, value)):
                return value
            return [self.plain(each, depth + 1) for each in value]
        if isinstance(value, Mapping) and value.keys() == {B64}:
            try:
                return base64.b64decode(value[B64], validate=True)
            except (binascii.Error, TypeError, ValueError):
                raise BadRequest(f"'b64' is not base64: {shown(value[B64])}") from None
        return value
