"""Parameters of a request, and the limits of names, shapes and optional inputs."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.domain.contract import Contract
from services.gateway.domain.oip import decode
from tests.unit.protocol.test_oip_decode import (
    OPEN,
    SINGLE,
    X,
    ask,
    refused,
    spec,
    x,
)
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import KEPT_KEY, read_call_key
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.unit


def test_what_is_for_the_queue_is_not_for_the_model():
    got = ask(SINGLE, X, parameters={"timeout": 2_500, "priority": 2, "seed": 7, "sequence_id": 0})
    assert (got.timeout_ms, got.priority) == (2.5, 2)
    assert read_call_key(got.key).parameters == {"seed": 7}
    got = ask(SINGLE, X, parameters={"timeout": 0, "priority": 900})
    assert (got.timeout_ms, got.priority) == (None, 7)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"timeout": "1"},
            "Unable to parse 'timeout': this parameter must be a whole number, 0 or more, got '1'",
        ),
        (
            {"timeout": -1},
            "Unable to parse 'timeout': this parameter must be a whole number, 0 or more, got -1",
        ),
        (
            {"priority": True},
            "Unable to parse 'priority': this parameter must be a whole number, 0 or more, got True",
        ),
        (
            {"triton_x": 1},
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
            "specified. Rename 'triton_x'",
        ),
        (
            {"seeds": [1]},
            "parameter 'seeds' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
        (
            {"seeds": None},
            "parameter 'seeds' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
        ({"seed": 2**63}, "parameter 'seed' must fit into 64 bits, got a number of 19 digits"),
        (
            {"timeout": 2**63},
            f"Unable to parse 'timeout': this parameter must be a whole number, 0 or more, got {2**63}",
        ),
    ],
)
def test_wrong_parameters(parameters, message):
    assert refused(SINGLE, X, parameters=parameters) == message


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_parameters_that_are_no_number(value):
    body = b'{"inputs": [%b], "parameters": {"heat": %b}}' % (orjson.dumps(X), value.encode())
    with pytest.raises(BadRequest, match="parameter 'heat' must be a finite number"):
        decode(body, None, SINGLE)


def test_the_largest_numbers_are_carried():
    limits = {"least": -(2**63), "most": 2**63 - 1}
    assert read_call_key(ask(SINGLE, X, parameters=limits).key).parameters == limits


def test_a_shape_that_nothing_could_have():
    """Its product has more digits than Python writes."""
    shape = [2**63 - 1] * 255
    message = f"input 'x': 'shape' causes total element count to exceed maximum size of {2**63 - 1}"
    assert refused(OPEN, x(shape=shape)) == message


def test_names_and_parameters_have_a_limit():
    """They are a part of every message, beside data that may take another way."""
    message = "but the limit is 65536: send large values as tensors"
    ask(SINGLE, X, parameters={"prompt": "a" * 65_000})
    assert message in refused(SINGLE, X, parameters={"prompt": "a" * 65_536})
    free = OPEN
    many = [{"name": str(number)} for number in range(70_000)]
    assert message in refused(free, X, outputs=many)
    assert message in refused(free, X, outputs=many[:20_000])
    assert len(read_call_key(ask(free, X, outputs=many[:5_000]).key).outputs) == 5_000


def test_what_a_caller_fills_is_not_remembered():
    envelope._kept_call_key.cache_clear()
    for number in range(10):
        key = ask(SINGLE, X, parameters={"prompt": f"{number}" * KEPT_KEY}).key
        assert read_call_key(key).parameters["prompt"].startswith(str(number))
    assert envelope._kept_call_key.cache_info().currsize == 0
    read_call_key(ask(SINGLE, X).key)
    assert envelope._kept_call_key.cache_info().currsize == 1


def test_optional_inputs_may_be_missing():
    bias = TensorSpec(name="bias", datatype="FP32", shape=[1], optional=True)
    outputs = [spec("y", "FP32", 1)]
    contract = Contract(Signature(inputs=[bias, spec("x", "FP32", 2)], outputs=outputs, max_batch_size=4))
    given = {"name": "bias", "datatype": "FP32", "shape": [1, 1], "data": [3]}
    assert [t.name for t in read_call_key(ask(contract, X).key).inputs] == ["x"]
    assert [t.name for t in read_call_key(ask(contract, X, given).key).inputs] == ["bias", "x"]
    assert ask(contract, X).key != ask(contract, X, given).key, "they never share a call"
    assert "missing required input(s) ['x']" in refused(contract, given)
    assert "missing required input(s) ['x']" in refused(contract)
    # Nothing would tell how many rows there are.
    rows = Contract(Signature(inputs=[bias], outputs=outputs, max_batch_size=4))
    assert "'inputs' must be a list" in refused(rows)
    free = Contract(Signature(inputs=[bias], outputs=outputs))
    got = ask(free)
    assert (got.data, got.rows, read_call_key(got.key).inputs) == ([], 0, ())
