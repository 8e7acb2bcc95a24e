"""TGI's, Ollama's and the engines' own routes at a gateway process, with an engine that each test plays."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.gateway.test_openai import Engine
from tidegate.kernel.protocol.llm import SIGNATURE

pytestmark = pytest.mark.integration

HI = {"model": "digits:latest", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"inputs": "one two", "parameters": {"max_new_tokens": 3}}


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    return {"TIDEGATE_AUTH": "required", "TIDEGATE_REGISTRY_URL": registry.url}


@pytest.fixture(scope="module")
def gateway_route() -> dict[str, Any]:
    llm = {"context": 512, "adapters": ["pirate"], "slots": 2, "created": 7}
    return {"format": "llm", "signature": SIGNATURE.model_dump(), "llm": llm}


@pytest.fixture
def client(client_with_token) -> httpx.AsyncClient:
    return client_with_token


@pytest.fixture
def engine(worker, until) -> Engine:
    return Engine(worker, until)


def text(piece: str, id_: int = 4) -> dict[str, Any]:
    entry = {"id": id_, "token": piece, "logprob": -0.5}
    return {"choices": [{"index": 0, "text": piece, "logprobs": {"content": [entry]}}]}


def delta(piece: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": piece}, **more}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}


async def lines(client: httpx.AsyncClient, path: str, body: Any) -> tuple[httpx.Response, list[str]]:
    async with client.stream("POST", path, json=body) as answer:
        return answer, [line async for line in answer.aiter_lines() if line and line != ": keep-alive"]


@pytest.mark.parametrize("path", ["/generate_stream", "/tgi/digits/generate_stream", "/", "/tgi/digits"])
async def test_tgi_stream(client, engine, path):
    reading = asyncio.create_task(lines(client, path, TEXT | {"stream": True}))
    request, asked = await engine.asked()
    assert (asked.path, asked.body["model"], asked.body["prompt"]) == ("/v1/completions", "digits", "one two")
    await engine.send(request, text("a"), text("b", 5))
    await engine.send(request, {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}, USAGE)
    await engine.end(request)
    answer, found = await reading
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [orjson.loads(line.removeprefix("data: ")) for line in found]
    assert [(event["token"]["id"], event["token"]["text"]) for event in events] == [
        (4, "a"),
        (5, "b"),
        (-1, ""),
    ]
    assert (events[-1]["generated_text"], events[-1]["details"]["generated_tokens"]) == ("ab", 3)


@pytest.mark.parametrize(("path", "in_list"), [("/generate", False), ("/", True)])
async def test_tgi_whole(client, engine, path, in_list):
    asking = asyncio.create_task(client.post(path, json=TEXT))
    request, asked = await engine.asked()
    assert asked.body["stream"] is True
    await engine.send(request, text("a"), text("b"))
    await engine.end(request)
    document = (await asking).json()
    assert (document[0] if in_list else document) == {"generated_text": "ab"}


async def test_tgi_errors(client, engine):
    wrong = await client.post("/generate", json={"inputs": ""})
    assert (wrong.status_code, wrong.json()["error_type"]) == (422, "validation")
    missing = await client.post("/tgi/nobody/generate", json=TEXT)
    assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")
    reading = asyncio.create_task(lines(client, "/generate_stream", TEXT))
    request, _ = await engine.asked()
    await engine.send(request, text("a"))
    await engine.send(request, {"error": {"message": "the engine broke"}})
    await engine.end(request)
    _, found = await reading
    assert orjson.loads(found[-1][6:]) == {"error": "the engine broke", "error_type": "generation"}


async def test_tgi_facts(client, gateway):
    assert (await client.get("/info")).json()["max_total_tokens"] == 512
    assert (await client.get("/tgi/digits/info")).json()["model_id"] == "digits"
    assert (await client.get("/tgi/digits:pirate/info")).json()["model_id"] == "digits:pirate"
    assert (await client.get("/tgi/nobody/info")).status_code == 404
    async with httpx.AsyncClient(base_url=gateway.url) as nobody:
        assert (await nobody.get("/health")).status_code == 200
        assert (await nobody.post("/generate", json=TEXT)).status_code == 401


async def test_a_path_of_tgi_opens_openais_api(client, engine):
    body = {"model": "tgi", "messages": HI["messages"]}
    asking = asyncio.create_task(client.post("/tgi/digits/v1/chat/completions", json=body))
    request, asked = await engine.asked()
    assert (asked.path, asked.body["model"]) == ("/v1/chat/completions", "digits")
    await engine.send(request, {"choices": [], "model": "x.gguf"})
    await engine.end(request)
    assert (await asking).json()["model"] == "digits"


async def test_ollama_stream(client, engine):
    reading = asyncio.create_task(
        lines(client, "/api/chat", HI | {"options": {"num_ctx": 9, "num_predict": 3}})
    )
    request, asked = await engine.asked()
    assert (asked.path, asked.body["model"], asked.body["max_tokens"]) == (
        "/v1/chat/completions",
        "digits",
        3,
    )
    await engine.send(request, delta("a"), delta("b", finish_reason="length"), USAGE)
    await engine.end(request)
    answer, found = await reading
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["x-tidegate-ignored"].startswith("num_ctx: ")
    *parts, last = map(orjson.loads, found)
    assert [part["message"]["content"] for part in parts if part["message"]["content"]] == ["a", "b"]
    assert (last["model"], last["done_reason"], last["eval_count"]) == ("digits:latest", "length", 3)
    assert last["total_duration"] >= last["load_duration"] > 0


async def test_ollama_whole_answers(client, engine):
    body = {"model": "digits", "prompt": "p", "raw": True, "stream": False}
    asking = asyncio.create_task(client.post("/api/generate", json=body))
    request, asked = await engine.asked()
    assert asked.path == "/v1/completions"
    await engine.send(request, text("a"), USAGE)
    await engine.end(request)
    assert (await asking).json()["response"] == "a"
    asking = asyncio.create_task(client.post("/api/embed", json={"model": "digits", "input": "a"}))
    request, asked = await engine.asked(1)
    assert asked.path == "/v1/embeddings"
    await engine.send(request, {"data": [{"index": 0, "embedding": [1.0]}]})
    await engine.end(request)
    assert (await asking).json()["embeddings"] == [[1.0]]


async def test_ollama_errors(client, engine):
    missing = await client.post("/api/chat", json=HI | {"model": "nobody"})
    assert (missing.status_code, list(missing.json())) == (404, ["error"])
    pulled = await client.post("/api/pull", json={"model": "digits"})
    assert (pulled.status_code, "tidegate deploy" in pulled.json()["error"]) == (400, True)
    deleted = await client.request("DELETE", "/api/delete", json={"model": "digits"})
    assert "tidegate delete" in deleted.json()["error"]
    image = {"role": "user", "content": "?", "images": ["iVBORw0KGgo="]}
    asking = asyncio.create_task(client.post("/api/chat", json=HI | {"messages": [image], "stream": False}))
    request, _ = await engine.asked()
    await engine.send(request, {"error": {"message": "image input is not supported"}}, status=500)
    await engine.end(request)
    refused = await asking
    assert (refused.status_code, "does not accept images" in refused.json()["error"]) == (400, True)


async def test_an_ollama_stream_that_breaks_ends_with_an_error(client, engine):
    reading = asyncio.create_task(lines(client, "/api/chat", HI))
    request, _ = await engine.asked()
    await engine.send(request, delta("a"))
    await engine.send(request, {"error": {"message": "the engine broke"}})
    await engine.end(request)
    _, found = await reading
    assert orjson.loads(found[-1]) == {"error": "the engine broke"}


async def test_ollamas_models(client, gateway):
    names = [model["name"] for model in (await client.get("/api/tags")).json()["models"]]
    assert names == ["digits:latest", "digits:pirate"]
    assert (await client.get("/api/ps")).json()["models"][0]["context_length"] == 512
    shown = await client.post("/api/show", json={"model": "digits"})
    assert shown.json()["capabilities"] == ["completion"]
    assert (await client.post("/api/show", json={"model": "nobody"})).status_code == 404
    assert (await client.get("/api/version")).json()["version"]
    loaded = await client.post("/api/generate", json={"model": "digits"})
    assert loaded.json()["done_reason"] == "load"
    async with httpx.AsyncClient(base_url=gateway.url) as nobody:
        assert (await nobody.head("/")).status_code == 200
        assert (await nobody.get("/api/tags")).status_code == 401


async def test_the_control_planes_paths_are_not_ollamas(client):
    """Both begin with ``/api/``."""
    unknown = await client.get("/api/chat/v1/models")
    assert "there is no service 'chat'" in unknown.json()["error"]
    assert (await client.get("/api/registry/v1/models")).json()["items"] == []


async def test_tokens(client, engine):
    asking = asyncio.create_task(client.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True}))
    request, asked = await engine.asked()
    assert (asked.path, asked.body["prompt"], asked.body["content"]) == ("/tokenize", "Hi", "Hi")
    await engine.send(request, {"tokens": [{"id": 4, "piece": "Hi"}]})
    await engine.end(request)
    assert (await asking).json() == {"count": 1, "max_model_len": 512, "tokens": [4], "token_strs": ["Hi"]}


async def test_a_chat_is_tokenized_with_the_engines_template(client, engine):
    asking = asyncio.create_task(client.post("/tokenize", json=HI | {"model": "digits"}))
    for number, answer in enumerate(
        ({"tokens": []}, {"prompt": "<u>hi"}, {"tokens": [{"id": 4, "piece": "x"}]})
    ):
        request, asked = await engine.asked(number)
        await engine.send(request, answer)
        await engine.end(request)
    assert (asked.path, asked.body["content"]) == ("/tokenize", "<u>hi")
    assert (await asking).json()["tokens"] == [4]


async def test_scores_pass_and_an_engine_without_them_is_named(client, engine):
    body = {"model": "digits", "query": "a", "documents": ["b"]}
    asking = asyncio.create_task(client.post("/v1/rerank", json=body))
    request, asked = await engine.asked()
    assert (asked.path, asked.body) == ("/v1/rerank", body)
    await engine.send(request, {"model": "x", "results": [{"index": 0, "relevance_score": 0.5}]})
    await engine.end(request)
    assert (await asking).json() == {"model": "digits", "results": [{"index": 0, "relevance_score": 0.5}]}
    asking = asyncio.create_task(client.post("/pooling", json={"model": "digits", "input": "a"}))
    request, _ = await engine.asked(1)
    await engine.send(request, {"error": {"message": "File Not Found", "code": 404}}, status=404)
    await engine.end(request)
    answer = await asking
    assert (answer.status_code, "/pooling" in answer.json()["error"]["message"]) == (404, True)
