"""Files of other libraries on the real Triton give the answers of their library: see `make test-formats`.

The files are made by their library, the registry reads their signature, and the version's requirements make
the environment, as in a deploy.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.registry.adapters import artifact_inspection, glimpses
from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.triton_client import ModelInferRequest
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import Figure, MadeOnce
from tests.integration.worker import format_makers
from tests.integration.worker.conftest import Running
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature

WANTED = os.environ.get("TIDEGATE_TEST_FORMATS", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not WANTED, reason="the libraries are a download of 0.1 to 1 GB: make test-formats"),
]

Run = Callable[..., Awaitable[Running]]
TYPES = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "BYTES": "O"}
# The library, its packages, the script, and the tolerance of the comparison.
LIBRARIES = {
    "xgboost": (["xgboost-cpu==3.2.0"], format_makers.XGBOOST),
    "lightgbm": (["lightgbm==4.7.0"], format_makers.LIGHTGBM),
    "catboost": (["catboost==1.2.10"], format_makers.CATBOOST),
    "skops": (["skops==0.16.0"], format_makers.SKOPS),
    "tensorflow": (["tensorflow-cpu==2.21.0", "tf2onnx==1.17.0"], format_makers.TENSORFLOW),
}
FILES: dict[str, str] = {
    "xgboost": "binary.ubj several.json softmax.ubj regression.json poisson.ubj rank.ubj margin.json "
    "dart.ubj linear.json targets.ubj stopped.ubj",
    "lightgbm": "binary.txt several.txt ova.txt regression.txt poisson.txt entropy.txt",
    "catboost": "binary.cbm texts.cbm several.cbm regression.cbm poisson.cbm targets.cbm categories.cbm",
    "skops": "pipeline.skops forest.skops regression.skops",
    "tensorflow": "net.zip converted.onnx light.tflite",
}
CASES = [(library, file) for library, files in FILES.items() for file in files.split()]


@pytest.fixture(scope="session")
def made(install: TritonInstall, made_once: MadeOnce, tmp_path_factory: Any) -> Callable[[str], Path]:
    """Return the folder with a library's files, made in an environment with the library."""

    def make(library: str) -> Path:
        import asyncio

        packages, script = LIBRARIES[library]

        def fill(folder: Path) -> None:
            environments = Environments(HostCache(folder), install, print)
            layered = asyncio.run(environments.provide(packages, {}, 1200))
            subprocess.run([layered.python, "-c", script, folder], check=True, timeout=600)

        return made_once(f"formats-{library}", fill)

    return make


@pytest.mark.parametrize(("library", "file"), [case for case in CASES if WANTED in ("1", case[0])])
async def test_answers_equal_those_of_the_library(
    library: str, file: str, made: Callable[[str], Path], run: Run, install: TritonInstall, figure: Figure
) -> None:
    import asyncio

    folder = await asyncio.to_thread(made, library)
    path = folder / file
    kind = glimpses.kind_of(path, file, ArchiveLimits())
    assert kind is not None
    assert kind.format is not None
    found = artifact_inspection.inspect(
        path, kind.format, model="m", user_signature=None, max_batch=512, limits=ArchiveLimits()
    )
    lines = [need.line for need in found.needs]
    if set(lines) <= set(LIBRARIES[library][0]):  # the environment that made the file
        lines = LIBRARIES[library][0]
    layered = await Environments(HostCache(folder), install, print).provide(lines, {}, 1200)
    running = await run(kind.format, path, found.signature, install=layered)
    signature = await running.client.signature("m")
    with np.load(path.with_suffix(".npz")) as arrays:
        expected = dict(arrays)
    inputs = {"input": expected.pop("x")}
    if "categories" in expected:
        inputs["categories"] = expected.pop("categories").astype(object)
    if library == "tensorflow":
        inputs = {"x": inputs["input"]}
    for begin, end in ((0, 1), (1, 100), (100, 300)):
        answer = await ask(running, signature, {name: each[begin:end] for name, each in inputs.items()})
        assert set(answer) == set(expected)
        for name, wanted in expected.items():
            same(answer[name], wanted[begin:end])
    figure(
        f"{library} {file}: {', '.join(expected)} of {len(next(iter(inputs.values())))} rows equal {lines[0]}"
    )


def same(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    if wanted.dtype.kind in "US":
        assert [each.decode() for each in found] == [str(each) for each in wanted]
    else:
        assert np.allclose(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


async def ask(running: Running, signature: Signature, inputs: dict[str, Any]) -> dict[str, Any]:
    message = ModelInferRequest(model_name=running.model)
    types = {tensor.name: tensor.datatype for tensor in signature.inputs}
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=types[name], shape=array.shape)
        message.raw_input_contents.append(packed(array, types[name]))
    answer = await running.client.infer(message, 60)
    return {
        output.name: unpacked(raw, output.datatype).reshape(output.shape)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def packed(array: Any, datatype: str) -> bytes:
    if datatype == "BYTES":
        return b"".join(len(each).to_bytes(4, "little") + each for each in array.ravel())
    return bytes(array.astype(TYPES[datatype]).tobytes())


def unpacked(raw: bytes, datatype: str) -> Any:
    if datatype != "BYTES":
        return np.frombuffer(raw, TYPES[datatype])
    texts, at = [], 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        texts.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return np.array(texts, dtype=object)
