"""Whatever body comes: a decoded request, or an error that is the caller's, within stated memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.domain import generate, oip
from services.gateway.domain.batch_lines import read_line
from services.gateway.domain.batches import Batch
from services.gateway.domain.contract import Contract
from tidegate.kernel.errors import BadRequest, PayloadTooLarge, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.tensors import (
    DATATYPES,
    count_strings,
    pack_strings,
    string_offsets,
    unpack_strings,
)

pytestmark = [pytest.mark.unit, pytest.mark.fuzz]

OURS = (BadRequest, PayloadTooLarge, Unavailable)


def contract_of(max_batch: int, *inputs: tuple[str, str, list[int]]) -> Contract:
    specs: list[Any] = [TensorSpec(name=n, datatype=d, shape=s) for n, d, s in inputs]
    return Contract(Signature(inputs=specs, outputs=specs[:1], max_batch_size=max_batch))


CONTRACTS = [
    Contract(None),
    contract_of(0, ("x", "FP32", [-1])),
    contract_of(8, ("x", "FP32", [2]), ("s", "BYTES", [-1])),
    contract_of(0, ("b", "BOOL", [2, 2])),
    contract_of(4, ("s", "BYTES", [1])),
    contract_of(0, ("x", "INT64", [-1, -1])),
    contract_of(0, ("h", "FP16", [-1])),
]

numbers = st.integers(-(2**66), 2**66) | st.floats() | st.sampled_from([0, 1, -1, 2**63, 2**64 - 1])
texts = st.text(max_size=8) | st.sampled_from(["x", "s", "b", "h", "name", "\ud800", "\0"])
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
shapes = st.lists(st.integers(-1, 4) | st.just(2**62), max_size=4) | anything
parameters = (
    st.dictionaries(
        st.sampled_from(
            ["binary_data", "binary_data_size", "binary_data_output", "timeout", "priority", "classification"]
        )
        | texts,
        scalars,
        max_size=3,
    )
    | anything
)
values = st.lists(scalars, max_size=6) | st.lists(st.lists(scalars, max_size=3), max_size=3) | anything
tensors = st.fixed_dictionaries(
    {"name": texts, "datatype": st.sampled_from(sorted(DATATYPES)) | anything, "shape": shapes},
    optional={"data": values, "parameters": parameters, "more": anything},
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(tensors, max_size=3) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"name": texts}, optional={"parameters": parameters}))
        | anything,
        "id": anything,
        "parameters": parameters,
        "model": texts | anything,
        "version": anything,
        "priority": anything,
        "ttl_s": anything,
        "s": values | scalars,
        "x": values | scalars,
    },
)


def dumped(value: Any) -> bytes:
    """As JSON; the standard library writes values that orjson refuses."""
    return json.dumps(value).encode()


bodies = requests.map(dumped) | anything.map(dumped) | st.binary(max_size=80)


def mutated(raw: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    changed = bytearray(raw)
    for at, size, put in cuts:
        where = at % (len(changed) + 1)
        changed[where : where + size] = put
    return bytes(changed)


cuts = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 3), st.binary(max_size=3)), max_size=3)


def within(size: int, call: Any) -> Any:
    """The result of a call; None for an error of ours. An AssertionError for more memory than is stated."""
    tracemalloc.start()
    try:
        found = call()
    except OURS as error:
        told = len(error.message)
    else:
        told = 0
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert told < 5000
    assert peak < 100 * size + 2**20
    return found if not told else None


@given(bodies, cuts, st.binary(max_size=40), st.sampled_from([None, 0, -3, 5]), st.sampled_from(CONTRACTS))
@example(
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[],"data":[1e999]}]}', [], b"", None, CONTRACTS[1]
)
def test_a_body_is_decoded_or_refused(body, cuts, tail, off, contract):
    body = mutated(body, cuts)
    length = off if off in (None, 0) else len(body)
    whole = body + tail if length is not None else body
    found = within(len(whole), lambda: oip.decode(memoryview(whole), length, contract))
    if found is not None:
        # What was taken can be sent to a worker, and read there.
        key = envelope.read_call_key(found.key)
        assert len(key.inputs) == len(found.data)
        for tensor, raw in zip(key.inputs, found.data, strict=True):
            rows = found.rows if contract.max_batch else 1
            count = rows
            for dim in tensor.dims:
                count *= dim
            if tensor.datatype.size:
                assert len(raw) == count * tensor.datatype.size
            else:
                assert len(unpack_strings(raw)) == count


@given(bodies, cuts, st.sampled_from(CONTRACTS))
def test_generate_decodes_or_refuses(body, cuts, contract):
    body = mutated(body, cuts)
    within(len(body), lambda: generate.decode(body, contract))


@given(bodies, cuts, st.sampled_from(CONTRACTS))
def test_a_line_of_a_batch_is_read_or_refused(body, cuts, contract):
    line, batch = mutated(body, cuts), Batch(bytes(16), "running", "p", lines=1, created_ms=0, model="m")

    def read() -> None:
        found = read_line(line, batch)
        oip.decode_head(found.head, memoryview(b""), contract)

    within(len(line), read)


@given(
    st.binary(max_size=200) | st.lists(st.binary(max_size=9), max_size=9).map(pack_strings), st.integers(1, 4)
)
@example(b"\xff\xff\xff\xff", 1)
@example(bytes(3), 1)
def test_strings_are_read_or_refused(raw, every):
    """By each of the three readers alike."""
    found: list[int | None] = []
    for read in (
        lambda: len(unpack_strings(raw)),
        lambda: count_strings(raw),
        lambda: len(string_offsets(raw, 1)),
    ):
        try:
            found.append(read())
        except (ValueError, struct.error):
            found.append(None)
    assert len(set(found)) == 1
    try:
        string_offsets(raw, every)
    except (ValueError, struct.error):
        assert found[0] is None


@given(st.lists(scalars, max_size=5), st.sampled_from(sorted(DATATYPES)))
def test_values_of_json_become_a_tensor_or_are_refused(data, datatype):
    contract = contract_of(0, ("x", datatype, [-1]))
    body = dumped({"inputs": [{"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}]})
    within(len(body), lambda: oip.decode(body, None, contract))
