"""Estimators that numpy 2 has pickled are served on the models' numpy 1, with the answers of numpy 2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters.triton_client import ModelInferRequest

pytestmark = pytest.mark.integration

FILES = Path(__file__).parent / "numpy_2"


@pytest.mark.parametrize(("file", "output"), [("boosted.joblib", "output"), ("network.pkl", "label")])
async def test_what_numpy_2_saved(run: Callable[..., Awaitable[Any]], file: str, output: str) -> None:
    running = await run("sklearn", FILES / file, None)
    with np.load(FILES / "expected.npz") as expected:
        x, wanted = expected["x"], expected[Path(file).stem]
    message = ModelInferRequest(model_name="m")
    message.inputs.add(name="input", datatype="FP64", shape=x.shape)
    message.outputs.add(name=output)
    message.raw_input_contents.append(x.tobytes())
    answer = await running.client.infer(message, 30)
    found = np.frombuffer(answer.raw_output_contents[0], wanted.dtype)
    assert np.allclose(found, wanted)
