"""A language model on the real Triton and the real llama.cpp: streams, cancellation, continued streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks import smollm2
from deploy.bootstrap.step import StepFailed
from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.model import Model
from services.worker.adapters.model_repository import prepare
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import new_triton, repository_in
from services.worker.adapters.warmup import warm_up
from services.worker.domain import llm_plan
from tests.conftest import PATIENCE_S, MadeOnce
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import envelope, llm
from tidegate.kernel.protocol.llm import LlmRequest, Meta, Resume
from tidegate.kernel.protocol.models import DeploymentSpec, Version
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

CHAT = "/v1/chat/completions"
SAY = {"messages": [{"role": "user", "content": "Write about the sea 🌊."}], "temperature": 0}


@dataclass
class Answer:
    """One answer of the model: its events and the facts about them."""

    events: list[dict[str, Any]]
    meta: Meta

    @property
    def text(self) -> str:
        deltas = [choice["delta"] for event in self.events for choice in event["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)


@pytest.fixture(scope="module")
def weights() -> Path:
    """Return SmolLM2 with float32 weights, whose greedy answers are exact."""
    try:
        return smollm2.provide("f32")
    except StepFailed as failure:
        pytest.skip(f"SmolLM2 cannot be had: {failure.what} {failure.remedy}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(
    install: TritonInstall, weights: Path, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Model]:
    """Start Triton with the model as a worker does: two slots, and the engine's package installed by pip."""
    version = Version.model_validate({
        "model": "smol", "number": 1, "format": "llm", "artifact_sha256": "0" * 64, "artifact_size": 1,
        "filename": weights.name, "signature": llm.SIGNATURE, "created_at": "2026-01-01T00:00:00Z",
    })  # fmt: skip
    fields = {
        "name": "smol-v1",
        "model": "smol",
        "version": 1,
        "threads": 2,
        "llm": {"slots": 2, "context": 512},
    }
    spec = DeploymentSpec.model_validate(fields)
    envs = made_once("llm-envs", lambda _: None)
    try:
        layered = await Environments(HostCache(envs), install, print).provide(
            llm_plan.requirements(version, spec), {}, 300
        )
    except ModelFailed as failure:
        pytest.skip(f"llama.cpp cannot be installed: {failure.message}")
    folder = tmp_path_factory.mktemp("replica")
    (name,) = prepare(version, spec, weights, repository_in(folder), layered)
    process = new_triton(layered, folder, TritonOptions(replica="smol-v1-0-1", auto_complete=False))
    await process.start()
    client = TritonClient(process.target, process.http)
    try:
        await client.load(name, 120)
        await warm_up(client, name, llm.SIGNATURE)
        yield Model(client, name, llm.SIGNATURE.outputs, decoupled=True)
    finally:
        await client.close()
        await process.stop(grace_s=0)


def asked(path: str, body: dict[str, Any], resume: Resume | None = None) -> envelope.Request:
    key = envelope.call_key((envelope.tensor(llm.REQUEST, "BYTES", (1,)),), (), {})
    data = [pack_strings([LlmRequest(path, body, resume).to_bytes()])]
    return envelope.read_request(envelope.request_frame(bytes(16), 0, 0, key, list(data)))


async def answers(
    model: Model, path: str, body: dict[str, Any], resume: Resume | None = None
) -> list[Answer]:
    async with aclosing(model.stream(asked(path, body, resume))) as found:
        return [read(answer) async for answer in found]


def read(answer: Any) -> Answer:
    raw = {output.name: output.raw for output in answer.outputs}
    events = [json.loads(each) for each in unpack_strings(raw[llm.EVENTS])]
    return Answer(events, Meta.from_bytes(unpack_strings(raw[llm.META])[0]))


async def test_an_answer_is_one_event_and_its_stream_has_the_same_text_and_usage(model: Model):
    body = SAY | {"max_tokens": 12}
    (whole,) = await answers(model, CHAT, body)
    parts = await answers(model, CHAT, body | {"stream": True})
    message = whole.events[0]["choices"][0]["message"]
    assert message["content"] == "".join(part.text for part in parts)
    assert message["role"] == "assistant"
    assert len(parts) > 3
    counts = [part.meta.usage[1] for part in parts if part.meta.usage]
    assert counts == sorted(counts)
    assert whole.meta.usage is not None
    assert parts[-1].meta.usage is not None
    assert whole.meta.usage[:2] == parts[-1].meta.usage[:2]
    assert counts[-1] == whole.events[0]["usage"]["completion_tokens"] == 12
    added = ("timings", "logprobs", "prompt_progress")
    deltas = [event for part in parts for event in part.events if event["choices"]]
    assert not [key for event in deltas for key in added if key in event or key in event["choices"][0]]


async def test_what_the_engine_refuses_is_an_error_event_with_its_status(model: Model):
    for stream in (False, True):
        (answer,) = await answers(model, CHAT, {"messages": "no list", "stream": stream})
        assert (answer.meta.status, "messages" in answer.events[0]["error"]["message"]) == (400, True)
    (answer,) = await answers(model, "/v1/unknown", {})
    assert answer.meta.status == 404
    assert answer.events[0]["error"]["type"] == "invalid_request_error"
    (answer,) = await answers(model, "/tokenize", {"content": "Hello world"})
    assert len(answer.events[0]["tokens"]) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_that_leaves_frees_its_slot(model: Model, stream: bool):
    endless = SAY | {"max_tokens": 480, "ignore_eos": True}
    begun = asyncio.Event()

    async def stay() -> None:
        async with aclosing(model.stream(asked(CHAT, endless | {"stream": True}))) as found:
            async for _ in found:
                begun.set()

    staying = asyncio.create_task(stay())
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
    leaving = asyncio.create_task(answers(model, CHAT, endless | {"stream": stream}))
    await asyncio.sleep(0.2)
    leaving.cancel()
    # Both slots were taken. If the second was not free now, this request would wait longer than the first.
    (answer,) = await answers(model, CHAT, SAY | {"max_tokens": 1})
    assert answer.meta.status == 200
    assert not staying.done()
    staying.cancel()
    await asyncio.gather(staying, leaving, return_exceptions=True)


async def test_a_stream_that_is_continued_after_any_token_has_the_text_of_the_undisturbed_one(model: Model):
    body = SAY | {"max_tokens": 24, "stream": True}
    whole = await answers(model, CHAT, body)
    ids = [each for part in whole for each in part.meta.ids]
    prompt = [each for part in whole for each in part.meta.prompt_ids]
    first, text, last = whole[0].events[0], "".join(part.text for part in whole), whole[-1].meta.usage
    assert last is not None
    assert (len(ids), len(prompt)) == (last[1], last[0])
    reached, cuts, due = 0, 0, 5
    before = ""
    for part in whole:
        before += part.text
        reached += len(part.meta.ids)
        if not part.meta.ids or reached < due or reached == len(ids):  # a part may have several tokens
            continue
        cuts, due = cuts + 1, reached + 5
        resume = Resume(prompt, ids[:reached], before, first["id"], first["created"])
        rest = await answers(model, CHAT, body, resume)
        assert before + "".join(each.text for each in rest) == text
        assert ids[:reached] + [each for part in rest for each in part.meta.ids] == ids
        assert rest[-1].meta.usage is not None
        assert rest[-1].meta.usage[:2] == last[:2]
        assert {event["id"] for each in rest for event in each.events} == {first["id"]}
    assert cuts >= 2
