"""Files of XGBoost and LightGBM, from the command line to the answer, equal to the library's own answer.

`make test-formats` compares more libraries and kinds of models, on Triton alone.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import Figure
from tests.e2e.conftest import Stack
from tests.integration.worker import format_makers
from tidegate.kernel.errors import ModelFailed

Make = Callable[[str, str], Path]
CASES = [
    ("xgboost-cpu==3.2.0", format_makers.XGBOOST_BINARY, "binary.ubj", "xgboost", "FP32"),
    ("lightgbm==4.7.0", format_makers.LIGHTGBM_CLASSES, "several.txt", "lightgbm", "FP64"),
]


@pytest.fixture
def make(stack: Stack, tmp_path: Path) -> Make:
    """Make a library's files in the environment that a worker will use too: the same requirement."""

    def run(package: str, script: str) -> Path:
        install = TritonInstall.find(stack.settings.runtime_path)
        environments = Environments(HostCache(stack.settings.state_path / "cache"), install, print)
        try:
            layered = asyncio.run(environments.provide([package], {}, 300))
        except ModelFailed as failure:
            pytest.skip(f"this machine cannot install {package}: {failure.message[:300]}")
        subprocess.run([layered.python, "-c", script, tmp_path], check=True, timeout=120)
        return tmp_path

    return run


@pytest.mark.parametrize(("package", "script", "file", "kind", "floats"), CASES)
def test_a_file_without_a_signature_or_code(
    stack: Stack, make: Make, figure: Figure, package: str, script: str, file: str, kind: str, floats: str
) -> None:
    path = make(package, script) / file
    version = stack.deploy(path, f"from-{kind}")["version"]
    assert (version["format"], version["requirements"]) == (kind, [package])
    with np.load(path.with_suffix(".npz")) as arrays:
        expected = dict(arrays)
    rows = expected.pop("x")
    assert np.isnan(rows).any(), "missing values are a part of the comparison"
    with triton.InferenceServerClient(stack.settings.gateway_url.removeprefix("http://")) as client:
        assert client.get_model_metadata(f"from-{kind}")["inputs"][0]["shape"] == [-1, rows.shape[1]]
        for begin, end in ((0, 1), (1, 40)):
            tensor = triton.InferInput("input", rows[begin:end].shape, floats)
            tensor.set_data_from_numpy(rows[begin:end])
            answer = client.infer(f"from-{kind}", [tensor])
            assert (answer.as_numpy("label") == expected["label"][begin:end]).all()
            off = np.abs(answer.as_numpy("probabilities") - expected["probabilities"][begin:end])
            assert off.max() <= 1e-6
    figure(f"{file} by the command line and tritonclient: 40 rows equal {package} within 1e-6")
