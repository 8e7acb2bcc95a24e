"""The real vLLM as an engine, alone and in Triton: see `make test-vllm`, which prints the numbers."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import smollm2
from services.worker.adapters.llm_engines import vllm_python
from services.worker.adapters.process_table import descendants
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S
from tests.integration.worker.test_triton_stream import model_of
from tidegate.kernel.protocol import envelope, llm
from tidegate.kernel.protocol.envelope import Request, tensor
from tidegate.kernel.protocol.llm import LlmRequest, Meta
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TIDEGATE_TEST_VLLM" not in os.environ, reason="vLLM starts slowly: make test-vllm"),
]

FOLDER = Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "llm"
CHAT = "/v1/chat/completions"
# With float32, a continued answer has exactly the text of an undisturbed one.
EXACT = {"dtype": "float32"}
START_S = 900.0


@pytest.fixture(scope="session")
def install(runtime: Path) -> TritonInstall:
    return TritonInstall.find(runtime).with_engine(vllm_python(runtime))


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    """The runtime's module, imported as in Triton's Python: by its plain name."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("vllm")
    sys.path.remove(str(FOLDER))


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(vllm: Any, runtime: Path) -> Iterator[Start]:
    """Start an engine with one of the models. All end with the module."""
    started = []

    def go(form: smollm2.Form, **arguments: Any) -> Any:
        weights = smollm2.provide(form)
        plan = {
            "name": "m", "weights": weights.name, "slots": 4, "context": 1024, "kv_total": 8192, "threads": 1,
            "gpus": [], "arguments": {**EXACT, **arguments}, "adapters": {},
            "engine_python": str(vllm_python(runtime)),
        }  # fmt: skip
        began = time.monotonic()
        started.append(vllm.Vllm(plan, weights.parent, on_end=print))
        print(f"\n{form} {arguments}: ready after {time.monotonic() - began:.1f} s")
        return started[-1]

    yield go
    for engine in started:
        engine.close()


@pytest.fixture(scope="module")
def engine(start: Start) -> Any:
    return start("hf")


class Stream:
    """A request that runs in a thread: its events and facts, as far as they have come."""

    def __init__(self, engine: Any, body: dict[str, Any], resume: Any = None, path: str = CHAT) -> None:
        calls = importlib.import_module("calls")
        self.call, self.parts = calls.Call(), list[tuple[list[Any], dict[str, Any]]]()

        def run() -> None:
            try:
                engine.call(path, body, resume, self.call)
            except calls.Refused as refused:
                self.call.emit([refused.body()], refused.meta())
            finally:
                self.call.end()

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def next(self) -> bool:
        """Wait for the next part. Return False after the last one."""
        events, meta, ended = self.call.take(PATIENCE_S)
        self.parts.append(([json.loads(event) for event in events], meta))
        return not ended

    def finish(self) -> Stream:
        while self.next():
            pass
        self.thread.join(PATIENCE_S)
        return self

    @property
    def events(self) -> list[Any]:
        return [event for events, _ in self.parts for event in events]

    @property
    def text(self) -> str:
        return text_of(self.events)

    @property
    def ids(self) -> list[int]:
        return [i for _, meta in self.parts for i in meta.get("ids", [])]

    @property
    def usage(self) -> Any:
        return [meta["usage"] for _, meta in self.parts if "usage" in meta][-1]

    @property
    def resume(self) -> dict[str, Any]:
        """Return what a gateway knows that has got these parts."""
        prompt = next(meta["prompt_ids"] for _, meta in self.parts if "prompt_ids" in meta)
        first = self.events[0]
        known = {"prompt": prompt, "emitted": self.ids, "text": self.text}
        return {**known, "id": first["id"], "created": first["created"]}


def text_of(events: list[Any]) -> str:
    choices = [choice for event in events for choice in event.get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices if "delta" in choice)


def chat(prompt: str = "Tell me about the sea.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "sea", "messages": messages, "stream": True, "temperature": 0, "max_tokens": 40, **more}


def wait_for(condition: Callable[[], bool]) -> float:
    """Return the seconds until the condition is true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.005)
    return time.monotonic() - began


def test_a_stream_has_text_ids_and_counts(engine: Any):
    stream = Stream(engine, chat()).finish()
    assert len(stream.ids) == 40
    assert stream.usage[1] == 40
    assert stream.events[-1]["usage"]["completion_tokens"] == 40
    assert {event["model"] for event in stream.events} == {"sea"}
    assert "token_ids" not in json.dumps(stream.events)
    again = Stream(engine, chat(stream=False)).finish()
    assert again.events[0]["choices"][0]["message"]["content"] == stream.text
    assert again.usage[2] > 0, "the prompt was in the prefix cache"


def test_refusals_have_vllms_text_and_status(engine: Any):
    [event] = (refused := Stream(engine, chat(temperature=-1)).finish()).events
    assert refused.parts[0][1]["status"] == 400
    assert "temperature" in event["error"]["message"]
    [event] = Stream(engine, chat(model="sea:legal")).finish().events
    assert event["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_frees_its_slot(engine: Any, stream: bool):
    running = Stream(engine, chat(stream=stream, max_tokens=900, ignore_eos=True))
    wait_for(lambda: engine.stats()["running"] == 1)
    running.call.cancel()
    freed_s = wait_for(lambda: engine.stats()["running"] == 0)
    print(f"\nstream={stream}: the slot was free {freed_s:.3f} s after the cancellation")
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("cut", [0, 1, 7, 20, 39])
def test_a_lost_stream_continues_with_the_undisturbed_text(engine: Any, cut: int):
    prompt = "Answer with emojis only: what do you eat?"
    whole = Stream(engine, chat(prompt)).finish()
    lost = Stream(engine, chat(prompt))
    while len(lost.ids) < cut or not lost.events:
        assert lost.next()
    lost.call.cancel()
    lost.thread.join(PATIENCE_S)
    rest = Stream(engine, chat(prompt), lost.resume).finish()
    assert lost.text + rest.text == whole.text
    assert lost.ids + rest.ids == whole.ids
    assert rest.usage[:2] == whole.usage[:2]
    assert rest.events[0]["id"] == lost.events[0]["id"]


def test_a_full_engine_works_on_all_its_slots(engine: Any):
    began = time.monotonic()
    streams = [Stream(engine, chat(f"Count to {n}.", ignore_eos=True)) for n in range(4)]
    most = 0
    while any(stream.thread.is_alive() for stream in streams):
        most = max(most, engine.stats()["running"])
    seconds = time.monotonic() - began
    assert most == 4
    assert all(len(stream.finish().ids) == 40 for stream in streams)
    print(f"\n4 streams: {160 / seconds:.0f} tokens/s")


def test_two_processes_share_a_model(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    pair = start("tiny", tensor_parallel_size=2)
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in descendants(pair._process.pid)]
    assert sum(name.startswith("VLLM::Worker") for name in names) == 2, names
    stream = Stream(pair, chat(ignore_eos=True)).finish()
    assert len(stream.ids) == stream.usage[1] == 40
    assert len(set(stream.ids)) > 1
    began = time.monotonic()
    processes = descendants(pair._process.pid)
    pair.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    print(f"\n{len(processes)} processes ended in {time.monotonic() - began:.1f} s")


# --- in Triton -------------------------------------------------------------------------------------------

Run = Callable[..., Awaitable[Any]]


def request(body: dict[str, Any]) -> Request:
    key = envelope.call_key((tensor(llm.REQUEST, "BYTES", (1,)),), (), {})
    data: list[envelope.Buffer] = [pack_strings([LlmRequest(CHAT, body).to_bytes()])]
    return envelope.read_request(envelope.request_frame(bytes(16), 0, 0, key, data))


async def answers_of(model: Any, body: dict[str, Any]) -> tuple[list[Any], list[Meta]]:
    events, metas = list[Any](), list[Meta]()
    async for answer in model.stream(request(body)):
        by_name = {output.name: unpack_strings(output.raw) for output in answer.outputs}
        events += [json.loads(event) for event in by_name[llm.EVENTS]]
        metas.append(Meta.from_bytes(by_name[llm.META][0]))
    return events, metas


async def test_in_triton_streams_run_together_and_a_killed_engine_ends_the_models_process(
    run: Run, tmp_path: Path
):
    archive = tmp_path / "smollm2.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(smollm2.provide("hf"), arcname=".")
    spec = {"engine": "vllm", "slots": 4, "context": 1024, "arguments": EXACT}
    began = time.monotonic()
    running = await run("llm", archive, llm.SIGNATURE, "smollm2", llm=spec)
    print(f"\nin Triton: ready after {time.monotonic() - began:.1f} s")
    model = await model_of(running)
    both = await asyncio.gather(*(answers_of(model, chat()) for _ in range(2)))
    assert text_of(both[0][0]) == text_of(both[1][0]) != ""
    assert both[0][1][-1].usage is not None
    assert both[0][1][-1].usage[1] == 40
    processes = descendants(running.process.pid)
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes}
    [stub] = [pid for pid, name in names.items() if name.startswith("triton_python")]
    [core] = [pid for pid, name in names.items() if name.startswith("VLLM::Engine")]
    lost = asyncio.create_task(answers_of(model, chat(max_tokens=900, ignore_eos=True)))
    await asyncio.sleep(0.5)
    os.kill(core, signal.SIGKILL)
    killed = time.monotonic()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in processes if pid in (stub, core)):
        assert time.monotonic() - killed < PATIENCE_S
        await asyncio.sleep(0.05)
    print(f"\nthe model's process ended {time.monotonic() - killed:.1f} s after the engine was killed")
    own = [pid for pid in processes if pid == stub or names[pid].startswith(("VLLM", "python"))]
    while any(Path(f"/proc/{pid}/exe").exists() for pid in own):
        assert time.monotonic() - killed < PATIENCE_S, "processes are left"
        await asyncio.sleep(0.05)
    lost.cancel()
