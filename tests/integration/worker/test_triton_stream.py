"""A decoupled model on the real Triton: answers come at once, and abandoned streams end."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tarfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.warmup import warm_up
from tidegate.kernel.errors import BadRequest, ModelFailed, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request, tensor
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
Run = Callable[..., Awaitable[Any]]


@pytest.fixture
async def tokens(run: Run, tmp_path: Path) -> Any:
    """Return the example as it is deployed: as an archive of its folder."""
    archive = tmp_path / "tokens.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(ROOT / "examples" / "python-model" / "tokens", arcname=".")
    return await run("triton", archive, None, "tokens")


async def model_of(running: Any) -> Model:
    signature: Signature = await running.client.signature(running.model)
    return Model(running.client, running.model, signature.outputs, decoupled=signature.decoupled)


def ask(text: str, count: int | None = None, delay_ms: float | None = None) -> Request:
    tensors, data = [tensor("text_input", "BYTES", (1,))], [pack_strings([text])]
    if count is not None:
        tensors.append(tensor("count", "INT32", (1,)))
        data.append(struct.pack("<i", count))
    if delay_ms is not None:
        tensors.append(tensor("delay_ms", "FP32", (1,)))
        data.append(struct.pack("<f", delay_ms))
    key = envelope.call_key(tuple(tensors), (), {})
    return envelope.read_request(envelope.request_frame(bytes(16), 0, 0, key, list(data)))


async def said(model: Model, request: Request) -> list[str]:
    return [unpack_strings(answer.outputs[0].raw)[0].decode() async for answer in model.stream(request)]


async def test_what_it_is_and_says(tokens):
    signature = await tokens.client.signature("tokens")
    assert signature.decoupled
    assert [(i.name, i.optional) for i in signature.inputs] == [
        ("text_input", False), ("count", True), ("delay_ms", True),
    ]  # fmt: skip
    await warm_up(tokens.client, "tokens", signature)
    model = await model_of(tokens)
    assert await said(model, ask("to be or not")) == ["to", "be", "or", "not"]
    assert await said(model, ask("a b", count=5)) == ["a", "b", "a", "b", "a"]
    assert await said(model, ask("", count=5)) == []
    text = [str(n) for n in range(1000)]
    assert await said(model, ask(" ".join(text))) == text
    with pytest.raises(BadRequest, match="ModelStreamInfer"):
        await model.call([ask("a")], 5)


async def test_each_answer_comes_when_it_is_made(tokens):
    model = await model_of(tokens)

    async def delays() -> list[float]:
        found = []
        async for answer in model.stream(ask("a b c d", delay_ms=300)):
            assert [output.name for output in answer.outputs] == ["text_output", "made_at"]
            found.append(time.time() - struct.unpack("<d", answer.outputs[1].raw)[0])
        assert len(found) == 4
        return found

    # None waits until the next one is made; but a busy machine may hold up a whole stream.
    assert any([max(await delays()) < 0.25 for _ in range(5)])


async def test_streams_run_side_by_side(tokens):
    """Each stream lasts until all have begun. One after the other, the first would end without that."""
    model = await model_of(tokens)
    begun: set[int] = set()

    async def one(number: int) -> bool:
        async with contextlib.aclosing(model.stream(ask(f"w{number}", 5000, 20))) as stream:
            async for _ in stream:
                begun.add(number)
                if len(begun) == 8:
                    return True
        return False

    assert await asyncio.gather(*(one(number) for number in range(8))) == [True] * 8


async def test_errors(tokens):
    model = await model_of(tokens)
    with pytest.raises(ModelFailed, match="count and delay_ms must be at least 0"):
        await said(model, ask("a", count=-1))
    wrong = envelope.call_key((tensor("text_input", "FP32", (1,)),), (), {})
    with pytest.raises(ModelFailed, match="data-type"):
        await said(model, ask("a")._replace(key=wrong, data=[bytes(4)]))
    assert await said(model, ask("still here")) == ["still", "here"]


async def test_leaving_cancels_in_triton(tokens, until):
    model = await model_of(tokens)
    async with aclosing(model.stream(ask("a", count=10_000, delay_ms=20))) as answers:
        for _ in range(3):
            await anext(answers)
    # Triton counts a request when it is over; this one would take minutes.
    await until(lambda: over(tokens, 1), patience_s=60)
    task = asyncio.create_task(said(model, ask("a", count=10_000, delay_ms=20)))
    await asyncio.sleep(0.1)
    task.cancel()
    await until(lambda: over(tokens, 2), patience_s=60)
    assert await said(model, ask("still here")) == ["still", "here"]


async def over(tokens, count: int) -> bool:
    statistics = (await tokens.client.statistics("tokens")).inference_stats
    return bool(statistics.success.count + statistics.fail.count >= count)


async def test_triton_gone_in_the_middle(tokens):
    model = await model_of(tokens)
    answers = model.stream(ask("a", count=1000, delay_ms=20))
    await anext(answers)
    await tokens.process.stop(grace_s=0)
    with pytest.raises(Unavailable):
        async for _ in answers:
            pass


async def test_a_python_file_with_a_signature_that_says_so(run: Run, tmp_path: Path):
    """Without a configuration of the user, the signature's ``decoupled`` is written into Triton's."""
    folder = ROOT / "examples" / "python-model" / "tokens"
    signature = Signature.model_validate(
        {
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1]},
                {"name": "count", "datatype": "INT32", "shape": [1], "optional": True},
                {"name": "delay_ms", "datatype": "FP32", "shape": [1], "optional": True},
            ],
            "outputs": [
                {"name": "text_output", "datatype": "BYTES", "shape": [1]},
                {"name": "made_at", "datatype": "FP64", "shape": [1]},
            ],
            "decoupled": True,
        }
    )
    running = await run("python", folder / "1" / "model.py", signature, "words")
    assert await running.client.signature("words") == signature
    assert await said(await model_of(running), ask("one two")) == ["one", "two"]
