"""Large tensors between worker and Triton in shared memory: the same answers, and nothing is left."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters import shared_memory
from services.worker.adapters.model import Model
from services.worker.adapters.shared_memory import Regions
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain.call_duration import Quickness
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.envelope import Buffer, Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.integration

ABOVE = 1000
MIXED = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        get = lambda name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        large, small, words = get("large"), get("small"), get("words")
        if small[0, 0] < 0:
            raise ValueError("a negative number")
        time.sleep(float(small[0, 1]))
        if small[0, 2]:
            large = np.concatenate([large, large], axis=1)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("doubled", large * 2), pb_utils.Tensor("same", small),
            pb_utils.Tensor("back", words), pb_utils.Tensor("half", large[:, : large.shape[1] // 2]),
        ])
"""
SIZE = 50_000
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="small", datatype="FP32", shape=[3]),
        TensorSpec(name="large", datatype="FP32", shape=[SIZE]),
        TensorSpec(name="words", datatype="BYTES", shape=[1]),
    ],
    outputs=[
        TensorSpec(name="same", datatype="FP32", shape=[3]),
        TensorSpec(name="doubled", datatype="FP32", shape=[SIZE]),
        TensorSpec(name="back", datatype="BYTES", shape=[1]),
        TensorSpec(name="half", datatype="FP32", shape=[-1]),
    ],
    max_batch_size=8,
)


def request(seed: int, rows: int = 1, *, outputs=(), small=(1.0, 0.0, 0.0), flags: int = 1) -> Request:
    large = np.random.default_rng(seed).random((rows, SIZE), np.float32)
    words = b"".join(len(word).to_bytes(4, "little") + word for word in [b"w%d" % seed] * rows)
    inputs = (tensor("small", "FP32", (3,)), tensor("large", "FP32", (SIZE,)), tensor("words", "BYTES", (1,)))
    data: list[Buffer] = [np.tile(np.array(small, np.float32), (rows, 1)).tobytes(), large.tobytes(), words]
    key = call_key(inputs, tuple(outputs), {})
    return read_request(memoryview(request_frame(os.urandom(16), 1, rows, key, data, flags=flags)))


def regions_of(process) -> list[Path]:
    return list(shared_memory.FOLDER.glob(f"{process.region}-io-*"))


@pytest.fixture
async def mixed(run, tmp_path):
    (tmp_path / "model.py").write_text(MIXED)
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    regions = Regions(running.client, running.process.region)
    yield running, Model(running.client, running.model, SIGNATURE.outputs, regions, ABOVE), regions
    await regions.close()


def going(model: Model, way: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make calls of the model go this way; return the ways that calls of all models went."""
    model._quickness = Quickness(60.0 if way == "http" else 0.0)
    model._quickness.answered(0.001)
    went: list[str] = []
    for name in ("infer_http", "infer_raw"):
        original = getattr(TritonClient, name)

        async def noted(*given: Any, name: str = name, original: Any = original) -> Any:
            went.append("http" if name == "infer_http" else "grpc")
            return await original(*given)

        monkeypatch.setattr(TritonClient, name, noted)
    return went


async def check(model: Model, plain: Model, *requests: Request) -> None:
    found, right = await model.call(list(requests), 10), await plain.call(list(requests), 10)
    assert [(o.name, o.datatype, o.shape, bytes(o.raw)) for o in found.outputs] == [
        (o.name, o.datatype, o.shape, bytes(o.raw)) for o in right.outputs
    ]


@pytest.mark.parametrize("way", ["http", "grpc"])
async def test_answers_are_those_without_it(mixed, monkeypatch, way):
    running, model, regions = mixed
    went = going(model, way, monkeypatch)
    plain = Model(running.client, running.model, SIGNATURE.outputs)
    for requests in (
        [request(1)],
        [request(2, 3)],
        [request(3), request(4, 2), request(5)],
        [request(6, outputs=("same", "doubled"))],
        [request(7, outputs=("back", "half"))],
    ):
        await check(model, plain, *requests)
    assert set(went[::2]) == {way}, "the calls between are those of the plain model"
    assert len(regions._free) == 2, "of two sizes, both free again"
    assert regions_of(running.process) == [], "it has no name any more"


async def test_calls_at_the_same_time_have_regions_of_their_own(mixed):
    _, model, _ = mixed
    requests = [request(seed, small=(1.0, 0.05, 0.0)) for seed in range(5)]
    for asked, answer in zip(
        requests, await asyncio.gather(*(model.call([r], 20) for r in requests)), strict=True
    ):
        doubled = next(o for o in answer.outputs if o.name == "doubled")
        assert doubled.raw == (np.frombuffer(asked.data[1], np.float32) * 2).tobytes()


async def test_an_error_gives_the_region_back(mixed):
    _, model, regions = mixed
    with pytest.raises(ModelFailed, match="a negative number"):
        await model.call([request(1, small=(-1.0, 0.0, 0.0))], 10)
    assert (len(regions._free), len(regions._retired)) == (1, 0)


async def test_a_call_that_was_given_up_never_shares_its_region(mixed, monkeypatch):
    running, model, regions = mixed
    monkeypatch.setattr(shared_memory, "RETIRED_S", 0.01)
    call = asyncio.create_task(model.call([request(1, small=(1.0, 5.0, 0.0))], 60))
    await asyncio.sleep(0.2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert regions._free == []
    await asyncio.sleep(0.1)
    await asyncio.gather(*regions._tasks)
    assert regions._in_use == 0, "Triton was told, and it is let go"
    plain = Model(running.client, running.model, SIGNATURE.outputs)
    await check(model, plain, request(2))


@pytest.mark.parametrize("way", ["http", "grpc"])
async def test_an_output_larger_than_the_signature_says(mixed, monkeypatch, way):
    _, model, _ = mixed
    went = going(model, way, monkeypatch)
    answer = await model.call([request(1, small=(1.0, 0.0, 1.0))], 10)
    assert next(o for o in answer.outputs if o.name == "doubled").shape == (1, 2 * SIZE)
    assert went[0] == way
    fresh = Model(model._client, model._name, SIGNATURE.outputs, model._regions, ABOVE)
    with pytest.raises(ModelFailed, match="shared memory"):
        await fresh.call([request(1, small=(1.0, 0.0, 1.0), flags=0)], 10)


async def test_without_room_it_goes_by_grpc(mixed, monkeypatch):
    running, model, regions = mixed
    plain = Model(running.client, running.model, SIGNATURE.outputs)
    monkeypatch.setattr(shared_memory, "FOLDER", Path("/dev/null"))
    await check(model, plain, request(1))
    assert regions._in_use == 0
    monkeypatch.undo()
    monkeypatch.setattr(shared_memory, "TOTAL_LIMIT", 1000)
    await check(model, plain, request(1))
    assert regions._free == []


async def test_a_large_region_is_not_kept(mixed, monkeypatch):
    running, model, regions = mixed
    monkeypatch.setattr(shared_memory, "KEPT_LIMIT", 1000)
    await check(model, Model(running.client, running.model, SIGNATURE.outputs), request(1))
    await asyncio.gather(*regions._tasks)
    assert (regions._free, regions._in_use) == ([], 0)
