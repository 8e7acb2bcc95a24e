"""A Python model whose process dies: Triton stays up and never starts another, so only a new Triton helps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from services.worker.adapters.model import Model
from tests.integration.worker.conftest import ROOT, Run
from tidegate.errors import Unavailable
from tidegate.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.integration

KILLER = ROOT / "benchmarks" / "models" / "killer" / "model.py"
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[1])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[1])],
    max_batch_size=8,
)
SEGFAULT = 1000.0


def request(number: float) -> Request:
    key = call_key((tensor("x", "FP32", (1,)),), (), {})
    return read_request(request_frame(os.urandom(16), 1, 1, key, [np.array([[number]], "<f4").tobytes()]))


async def test_the_death_of_the_models_process_is_a_loss_of_the_server(run: Run, tmp_path: Path) -> None:
    """Not the fault of every request that follows, which is what Triton makes of it."""
    (tmp_path / "model.py").write_bytes(KILLER.read_bytes())
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    model = Model(running.client, running.model, SIGNATURE.outputs)
    assert (await model.call([request(2.0)], 20)).outputs[0].raw == np.array([[4.0]], "<f4").tobytes()
    assert running.client.model_died is False
    for number in (SEGFAULT, 1.0):
        with pytest.raises(Unavailable, match="model's process died"):
            await model.call([request(number)], 20)
    assert running.client.model_died is True
    assert await running.client.live(), "Triton itself says that all is well"
