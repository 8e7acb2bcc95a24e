"""The checks of a scratch replica on a model in a real Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.registry.adapters import artifact_inspection
from services.worker.application.version_check import VersionCheck
from tests.integration.worker.conftest import Run
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature

pytestmark = pytest.mark.integration


async def test_a_model_answers_zeros_or_its_samples_and_is_measured(run: Run, models: Path) -> None:
    signature = artifact_inspection.inspect(
        models / "model.onnx",
        "onnx",
        model="m",
        user_signature=None,
        max_batch=64,
        limits=ArchiveLimits(),
        allow_pickle=False,
    ).signature
    assert signature is not None
    running = await run("onnx", models / "model.onnx", signature)
    check = VersionCheck(running.client, running.model, signature, 64)
    await check.check([])
    batches = await check.measure(1)
    assert [each.rows for each in batches] == [1, 8, 64]
    assert all(0 < each.p50_ms <= each.p99_ms for each in batches)
    assert not check.caveat

    image: dict[str, Any] = {"name": "image", "datatype": "FP32", "shape": [2, 64], "data": [0] * 128}
    answered = VersionCheck(running.client, running.model, signature, 64)
    await answered.check([{"inputs": [image]}])
    assert [each.rows for each in await answered.measure(1)] == [2, 8, 64], "whole samples"
    for wrong, words in (
        ({"inputs": [image], "expected": {"label": [0, 11]}}, "unexpected answer to sample 1: label"),
        ({"inputs": [image | {"datatype": "INT64"}]}, "failed on sample 1"),
        ({"inputs": "none"}, "sample 1 is not an inference request"),
    ):
        with pytest.raises(ModelFailed, match=words):
            await VersionCheck(running.client, running.model, signature, 64).check([wrong])


async def test_a_model_that_takes_no_zeros_is_only_loaded_if_they_may_be_invalid(
    run: Run, tmp_path: Path
) -> None:
    """An empty text may be invalid; a number of the right size is not."""
    (tmp_path / "model.py").write_text(
        "import triton_python_backend_utils as pb_utils\n"
        "class TritonPythonModel:\n"
        "    def execute(self, requests):\n"
        "        raise ValueError('not this')\n"
    )
    for datatype, certain in (("BYTES", False), ("FP32", True)):
        signature = Signature.model_validate({
            "inputs": [{"name": "x", "datatype": datatype, "shape": [1]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
            "max_batch_size": 4,
        })  # fmt: skip
        running = await run("python", tmp_path / "model.py", signature)
        check = VersionCheck(running.client, running.model, signature, 4)
        if certain:
            with pytest.raises(ModelFailed, match="not this"):
                await check.check([])
        else:
            await check.check([])
            assert "not this" in check.caveat
            assert not await check.measure(1)
