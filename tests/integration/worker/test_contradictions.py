"""A model whose answers contradict its signature: refused when it is loaded, counted when it serves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.warmup import warm_up
from services.worker.domain.output_check import OutputCheck
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.envelope import RETRY_SAFE, Request, Tensor, call_key
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.tensors import DATATYPES

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
# Zeros get what the signature says, anything else FP64 of 99 columns.
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        def answer(x):
            right = np.zeros((len(x), 4), np.float32)
            return right if not x.any() else np.zeros((len(x), 99), np.float64)

        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", answer(x))]) for x in inputs]
"""


def signature(columns: int = 4, datatype: Any = "FP32") -> Signature:
    return Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[4])],
        outputs=[TensorSpec(name="y", datatype=datatype, shape=[columns])],
        max_batch_size=8,
    )


def request(value: float) -> Request:
    key = call_key((Tensor("x", DATATYPES["FP32"], (4,)),), (), {})
    raw = np.full((1, 4), value, np.float32).tobytes()
    deadline_ms = int(time.time() * 1e3) + 30_000
    return Request(b"%16d" % 1, deadline_ms, 1, 1, RETRY_SAFE, b"", b"", key, [raw], b"")


async def test_refused_at_load_and_counted_at_run_time(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "model.py"
    source.write_text(MODEL)
    running = await run("python", source, signature(), "m")
    await warm_up(running.client, "m", signature())
    with pytest.raises(ModelFailed, match=r"'y' is FP32 \[1, 4\], but the signature says FP64 \[1, 9\]"):
        await warm_up(running.client, "m", signature(9, "FP64"))

    check = OutputCheck(signature())
    model = Model(running.client, "m", signature().outputs, check=check)
    caplog.set_level(logging.WARNING)
    for value, counted in ((0.0, 0), (1.0, 1), (1.0, 2), (0.0, 2)):
        answer = await model.call([request(value)], 30)
        assert math.prod(answer.outputs[0].shape) == (99 if value else 4), "its caller still gets it"
        assert check.count == counted
    assert "'y' is FP64 [1, 99], but the signature says FP32 [1, 4]" in check.last
    told = [each for each in caplog.records if "contradict" in each.getMessage()]
    assert len(told) == 1, "the log has it once a minute"
