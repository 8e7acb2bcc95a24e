"""Python files with ``predict`` and nothing of Triton in them, on the real Triton."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.adapters.warmup import warm_up
from services.worker.domain.load_failures import explain
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import python_model, python_signature
from tidegate.kernel.protocol.redaction import told

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
Serve = Callable[[str], Awaitable[Any]]

BATCHED = """
from typing import NamedTuple

import numpy as np
from tidegate import Tensor, batched

ROWS = []


class Answer(NamedTuple):
    total: Tensor["FP32", -1]
    rows: Tensor["INT64", -1, 1]


class Model:
    def load(self, folder, device, threads=1):
        assert (folder / "model.py").exists() and (device, threads) == ("cpu", 1)
        self.offset = np.float32(1)

    @batched(max_size=8)
    def predict(self, x: Tensor["FP32", -1, 2]) -> Answer:
        if (x < 0).any():
            raise ValueError(f"negative, in {__file__}")
        return Answer(x.sum(axis=1) + self.offset, np.full((len(x), 1), len(x)))
"""
TEXTS = """
def predict(text: str, times: int = 2, raw: bytes | None = None) -> {"said": str, "size": int}:
    if raw is not None:
        assert isinstance(raw, bytes)
        text = str(len(raw))
    return {"said": text * times, "size": len(text)}
"""
STREAM = """
import asyncio
from collections.abc import AsyncIterator


class Model:
    async def load(self):
        self.pause = asyncio.Event()

    async def predict(self, text: str) -> AsyncIterator[str]:
        for word in text.split():
            if word == "stop":
                raise RuntimeError("stopped as asked")
            await asyncio.sleep(0)
            yield word
"""


@pytest.fixture
def serve(run: Run, tmp_path: Path) -> Serve:
    """Load a source as the registry and the worker do."""

    async def go(source: str) -> Any:
        path = tmp_path / "mine.py"
        path.write_text(source)
        signature = python_signature.signature_of(python_model.read(python_model.parsed(source)), None)
        running = await run("python", path, signature)
        await warm_up(running.client, running.model, signature)
        return running

    return go


def asked(model: str, **inputs: Any) -> Any:
    message = ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        if isinstance(value, bytes):
            message.inputs.add(name=name, datatype="BYTES", shape=[1])
            message.raw_input_contents.append(len(value).to_bytes(4, "little") + value)
            continue
        array = np.asarray(value)
        kind = {"f": "FP32", "i": "INT64"}[array.dtype.kind]
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message


def read(answer: Any) -> dict[str, Any]:
    kinds = {"FP32": "<f4", "INT64": "<i8"}
    return {
        output.name: raw[4:]
        if output.datatype == "BYTES"
        else np.frombuffer(raw, kinds[output.datatype]).tolist()
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


async def ask(client: TritonClient, model: str, **inputs: Any) -> dict[str, Any]:
    return read(await client.infer(asked(model, **inputs), 10))


async def test_a_class_gets_the_rows_of_a_call_stacked(serve: Serve) -> None:
    running = await serve(BATCHED)
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert await ask(running.client, "m", x=x) == {"total": [4, 8, 12], "rows": [3, 3, 3]}
    with pytest.raises(ModelFailed) as refused:
        await ask(running.client, "m", x=-x)
    # The caller gets the type and the text, without the path that was in it; the stack is for the log.
    message, traceback = told(refused.value.message)
    assert message == "ValueError: negative, in model.py"
    assert 'File "model.py", line 23, in predict' in traceback
    assert "tidegate_" not in traceback


async def test_python_values_and_optional_arguments(serve: Serve) -> None:
    running = await serve(TEXTS)
    assert await ask(running.client, "m", text=b"ab") == {"said": b"abab", "size": [2]}
    times = np.array([3])
    assert await ask(running.client, "m", text="ä".encode(), times=times) == {
        "said": "äää".encode(),
        "size": [1],
    }
    assert (await ask(running.client, "m", text=b"", raw=b"\xff\x00\x00"))["said"] == b"33"
    with pytest.raises(ModelFailed, match="UnicodeDecodeError"):
        await ask(running.client, "m", text=b"\xff")


async def test_yield_is_a_stream(serve: Serve) -> None:
    running = await serve(STREAM)
    assert (await running.client.signature("m")).decoupled

    async def words(text: bytes) -> list[Any]:
        return [read(answer)["output"] async for answer in running.client.stream(asked("m", text=text))]

    several = list(await asyncio.gather(words(b"to be"), words(b"or not"), words(b"")))
    assert several == [[b"to", b"be"], [b"or", b"not"], []]
    with pytest.raises(ModelFailed, match="RuntimeError: stopped as asked"):
        await words(b"go stop go")
    assert await words(b"still here") == [b"still", b"here"]


async def test_a_package_that_is_missing_names_the_option(serve: Serve) -> None:
    with pytest.raises(ModelFailed) as failed:
        await serve("import xgboost\n\ndef predict(x: float) -> float:\n    return x\n")
    shown = explain(failed.value.message)
    assert shown.startswith("No module named 'xgboost'")
    assert "tidegate deploy ... --requirements requirements.txt" in shown
