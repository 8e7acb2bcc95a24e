"""Triton's response cache of a model that enables it: real hits, right answers, limited memory."""

import asyncio
import os
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.model_repository import cache_mb
from services.worker.adapters.shared_memory import Regions
from services.worker.adapters.triton_facts import counts
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import Figure
from tidegate.kernel.errors import BadRequest, ModelFailed
from tidegate.kernel.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import DeploymentSpec, TensorSpec

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
MIB = 2**20
# Answers with the number of its execution, so that a cached answer shows.
COUNTS = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.calls = 0

    def execute(self, requests):
        answers = []
        for request in requests:
            self.calls += 1
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            calls = np.full((len(x), 1), self.calls, "f4")
            answers.append(
                pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2), pb_utils.Tensor("calls", calls)])
            )
        return answers
"""
CONFIG = """
backend: "python" max_batch_size: 64
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {size} ] }} ]
output [
  {{ name: "y" data_type: TYPE_FP32 dims: [ {size} ] }},
  {{ name: "calls" data_type: TYPE_FP32 dims: [ 1 ] }}
]
"""
CACHE = "response_cache { enable: true }\n"
LARGE = 64 * 1024


@pytest.fixture
def counting(run: Run, tmp_path: Path) -> Callable[..., Awaitable[Any]]:
    """Serve the model from a Triton directory with a configuration, as users deploy it."""

    async def go(size: int, config: str = CACHE, **resources: object) -> Any:
        path = tmp_path / "model.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("m/config.pbtxt", CONFIG.format(size=size) + config)
            file.writestr("m/1/model.py", COUNTS)
        return await run("triton", path, None, resources=resources)

    return go


def outputs(size: int) -> list[TensorSpec]:
    return [
        TensorSpec(name="y", datatype="FP32", shape=[size]),
        TensorSpec(name="calls", datatype="FP32", shape=[1]),
    ]


def asked(
    *values: float, size: int = 4, select: Sequence[str] = (), parameters: Mapping[str, Any] | None = None
) -> Request:
    """A request with a row for each value."""
    x = np.repeat(np.array(values, "f4")[:, None], size, axis=1)
    key = call_key((tensor("x", "FP32", (size,)),), tuple(select), dict(parameters or {}))
    frame = request_frame(os.urandom(16), 1, len(values), key, [x.tobytes()], flags=1)
    return read_request(memoryview(frame))


async def answer(model: Model, *requests: Request) -> tuple[list[float], list[float]]:
    """Return for each row of one call: the doubled value, and the number of the execution that made it."""
    y, calls = (
        np.frombuffer(bytes(each.raw), "<f4") for each in (await model.call(list(requests), 10)).outputs
    )
    rows = sum(request.rows for request in requests)
    return y.reshape(rows, -1)[:, 0].tolist(), calls.tolist()


async def test_a_call_that_is_repeated_is_answered_from_the_cache(
    counting: Callable[..., Awaitable[Any]], until: Callable[..., Awaitable[Any]]
) -> None:
    """It used not to be: Triton was started without a cache, and did not warn."""
    running = await counting(4)
    model = Model(running.client, "m", outputs(4), cached=running.process.has_response_cache)
    assert await answer(model, asked(1)) == ([2], [1])
    for _ in range(5):
        # Over gRPC first, over HTTP once the model is known to be quick.
        assert await answer(model, asked(1)) == ([2], [1])
    assert await answer(model, asked(3)) == ([6], [2])

    async def counted() -> bool:
        found = counts(await running.client.statistics("m"))
        return (found["cache_hit.count"], found["cache_miss.count"], found["execution_count"]) == (5, 2, 2)

    await until(counted, "Triton counts an execution after it has answered")


async def test_requests_that_share_a_call_get_their_own_answers(
    counting: Callable[..., Awaitable[Any]],
) -> None:
    """The cache looks up the whole call: a known request together with others is a different call."""
    running = await counting(4)
    model = Model(running.client, "m", outputs(4), cached=running.process.has_response_cache)
    assert await answer(model, asked(1)) == ([2], [1])
    assert await answer(model, asked(1), asked(5, 6)) == ([2, 10, 12], [2, 2, 2])
    assert await answer(model, asked(5, 6), asked(1)) == ([10, 12, 2], [3, 3, 3])
    assert await answer(model, asked(1), asked(5, 6)) == ([2, 10, 12], [2, 2, 2]), "the same company"
    assert await answer(model, asked(1, 5, 6)) == ([2, 10, 12], [2, 2, 2]), "the same rows"
    many = await asyncio.gather(*(answer(model, asked(n % 3, n % 3)) for n in range(60)))
    assert [y for y, _ in many] == [[n % 3 * 2, n % 3 * 2] for n in range(60)]


async def test_a_request_that_selects_outputs_does_not_take_them_from_others(
    counting: Callable[..., Awaitable[Any]], until: Callable[..., Awaitable[Any]]
) -> None:
    """Triton looks answers up by the inputs alone, so all callers would get the first caller's outputs."""
    running = await counting(4)
    model = Model(running.client, "m", outputs(4), cached=running.process.has_response_cache)
    for select in (["y"], [], ["calls"], ["calls", "y"], ["y"]):
        found = await model.call([asked(1, select=select), asked(2, select=select)], 10)
        assert [output.name for output in found.outputs] == (select or ["y", "calls"])

    async def answered() -> Any:
        found = counts(await running.client.statistics("m"))
        complete = found["success.count"] == 5 and found["cache_miss.count"] and found["execution_count"]
        return found if complete else None

    found = await until(answered, "Triton counts an execution after it has answered")
    assert found["execution_count"] == 1
    with pytest.raises(BadRequest, match="has no output 'z'"):
        await model.call([asked(1, select=["z"])], 10)
    with pytest.raises(BadRequest, match=r"response cache, .* parameters of a request \(temperature\)"):
        await model.call([asked(1, parameters={"temperature": 1})], 10)
    # What is told of jobs is for the model to read if it runs at all.
    assert await model.call([asked(1)], 10, {"tidegate_jobs": "1:1:1"})


async def test_large_tensors_in_shared_memory_are_right_as_well(
    counting: Callable[..., Awaitable[Any]],
) -> None:
    running = await counting(LARGE)
    regions = Regions(running.client, running.process.region)
    model = Model(running.client, "m", outputs(LARGE), regions, 1000, cached=True)
    try:
        for _ in range(2):
            for value in (1, 2, 3):
                y, _ = await answer(model, asked(value, size=LARGE))
                assert y == [value * 2]
    finally:
        await regions.close()


async def test_the_cache_keeps_to_its_size(counting: Callable[..., Awaitable[Any]], figure: Figure) -> None:
    """It takes memory as it fills, up to the Deployment's response_cache_mb."""
    running = await counting(LARGE, response_cache_mb=16)
    model, triton = (
        Model(running.client, "m", outputs(LARGE), cached=True),
        psutil.Process(running.process.pid),
    )

    async def filled(first: int, mib: int) -> float:
        for value in range(first, first + mib * 4):  # 256 KiB each
            await answer(model, asked(value, size=LARGE))
        return float(triton.memory_info().rss) / MIB

    await filled(10_000, 1)
    before = triton.memory_info().rss / MIB
    full, more = await filled(0, 16), await filled(1000, 48)
    assert full - before > 8, "the answers are kept"
    assert more - before < 16 + 16, "and make room for others"
    grown = f"+{full - before:.1f} MiB when full, +{more - before:.1f} MiB after 64 MiB of answers"
    figure(f"response cache of 16 MiB: Triton {grown}")


async def test_a_model_that_does_not_ask_has_none(counting: Callable[..., Awaitable[Any]]) -> None:
    running = await counting(4, "response_cache { enable: false }\n")
    model = Model(running.client, "m", outputs(4), cached=running.process.has_response_cache)
    assert [await answer(model, asked(1)) for _ in range(2)] == [([2], [1]), ([2], [2])]
    assert "--cache-config" not in " ".join(psutil.Process(running.process.pid).cmdline())


async def test_a_decoupled_model_with_a_cache_is_refused_by_triton(
    counting: Callable[..., Awaitable[Any]],
) -> None:
    with pytest.raises(ModelFailed, match="ache"):
        await counting(4, CACHE + "model_transaction_policy { decoupled: true }\n")


def test_a_triton_without_the_cache_is_refused(install: TritonInstall, tmp_path: Path) -> None:
    """Triton would serve the model without a cache and only log a warning."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text(CACHE)
    spec = DeploymentSpec(name="m-v1", model="m", version=1)
    assert cache_mb(tmp_path, ["m"], spec, install) == 64
    other = replace(install, server=tmp_path / "bin" / "tritonserver")
    with pytest.raises(ModelFailed, match=r"'m' enables response_cache, but .* no cache `local`"):
        cache_mb(tmp_path, ["m"], spec, other)
