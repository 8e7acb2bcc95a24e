"""The implicit state of ONNX models in Tidegate's runtime, with a model that sums its inputs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.unit

STATES = Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "onnx" / "states.py"
START, END = 1, 2


class Rows:
    """The part of the real class that needs no Triton."""

    def __init__(self, config: dict[str, Any], call: Any) -> None:
        self.outputs, self._call = ["y"], call

    def _feed(self, request: Any) -> dict[str, Any]:
        return {"x": request.value, "state_in": 0}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with two slots."""
    rows, backend = ModuleType("rows"), ModuleType("triton_python_backend_utils")
    rows.Rows, rows.Call = Rows, Any  # type: ignore[attr-defined]
    rows.response = lambda names, arrays: arrays[0]  # type: ignore[attr-defined]
    rows.failure = str  # type: ignore[attr-defined]
    backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = START  # type: ignore[attr-defined]
    backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = END  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rows", rows)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.spec_from_file_location("states_of_tests", STATES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    batching = {"state": [{"input_name": "state_in", "output_name": "state_out"}]}

    def call(feed: dict[str, Any], names: list[str]) -> list[int]:
        return [feed["state_in"] + feed["x"] for _ in names]

    return module.StatefulRows({"sequence_batching": batching, "max_batch_size": 2}, call)


def run(model: Any, id_: int, value: int, flags: int = 0) -> Any:
    request = SimpleNamespace(
        value=value, correlation_id=lambda: id_, flags=lambda: flags, requested_output_names=list
    )
    return model.execute([request])[0]


def test_short_sequences_do_not_take_the_state_of_one_that_goes_on(model: Any) -> None:
    assert run(model, 1, 5, START) == 5
    for other in range(2, 9):
        assert run(model, other, 1, START) == 1
        assert run(model, other, 1, END) == 2
    assert run(model, 1, 5) == 10


def test_a_state_that_is_gone_is_an_error(model: Any) -> None:
    for id_ in (1, 2, 3):
        run(model, id_, 5, START)
    assert "start the sequence again" in run(model, 1, 5)
    assert run(model, 3, 5) == 10
    assert run(model, 0, 7) == 7, "a slot without a request has no state"
