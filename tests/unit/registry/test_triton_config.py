"""A config.pbtxt must state each field once, because readers differ in which one they take."""

from __future__ import annotations

import pytest

from services.registry.adapters import triton_config
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit

CONFIG = """
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""


@pytest.mark.parametrize(
    "twice",
    [
        "max_batch_size: 4",
        "dynamic_batching { } dynamic_batching { }",
        "model_transaction_policy { decoupled: true } model_transaction_policy { decoupled: false }",
        "model_transaction_policy { decoupled: true decoupled: false }",
        'input [ { name: "y" name: "z" data_type: TYPE_FP32 dims: [ 1 ] } ]',
        "dynamic_batching { } ensemble_scheduling { }",
    ],
)
def test_a_field_that_comes_twice_is_refused(twice):
    assert triton_config.parse(CONFIG, ".").signature is not None
    with pytest.raises(BadRequest, match="cannot be read"):
        triton_config.parse(CONFIG + twice, ".")


def test_deep_nesting_is_refused_and_not_an_error():
    with pytest.raises(BadRequest, match="cannot be read"):
        triton_config.parse(CONFIG + "unknown { " * 20_000, ".")
