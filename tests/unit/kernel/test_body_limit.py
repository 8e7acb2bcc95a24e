"""The largest body of a service's API is counted while it arrives, and refused before it is decoded."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import orjson
import pytest
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from tidegate.kernel.protocol.permissions import INTERNAL, OPEN, RoutePermissions
from tidegate.kernel.service.api import create_app
from tidegate.kernel.service.body_limit import _read
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.unit

TOKEN = "secret-token"
MOST = 4096
PERMISSIONS = RoutePermissions(
    {
        "GET /health/live": (OPEN,),
        "POST /v1/documents": (INTERNAL,),
        "PUT /v1/uploads": (INTERNAL,),
        "POST /v1/larger": (INTERNAL,),
    }
)


class Document(BaseModel):
    text: str


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield


@pytest.fixture
def decoded() -> list[Document]:
    return []


@pytest.fixture
async def client(tmp_path, decoded):
    router = APIRouter()

    @router.post("/v1/documents")
    async def take(document: Document) -> int:
        decoded.append(document)
        return len(document.text)

    @router.put("/v1/uploads")
    async def upload(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    @router.post("/v1/larger")
    async def larger(document: Document) -> int:
        return len(document.text)

    app = create_app(
        name="test",
        settings=Settings(state_dir=tmp_path, service_token=TOKEN, max_api_body_bytes=MOST),
        lifespan=lifespan,
        routers=[router],
        permissions=PERMISSIONS,
        larger_bodies={"/v1/uploads": None, "/v1/larger": 2**24},
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://127.0.0.1:8000",
        headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    ) as found:
        yield found


def document(size: int) -> bytes:
    return orjson.dumps({"text": "x" * (size - len('{"text":""}'))})


async def test_a_body_up_to_the_limit_is_taken(client, decoded):
    answer = await client.post("/v1/documents", content=document(MOST))
    assert answer.status_code == 200, answer.text
    answer = await client.post("/v1/documents", content=document(MOST + 1))
    assert answer.status_code == 413
    assert answer.json()["reason"] == "payload_too_large"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert len(decoded) == 1


@pytest.mark.parametrize("declared", [None, b"4097", b"4097  ", b"100"], ids=str)
async def test_a_body_without_an_end_is_read_no_further_than_the_limit(client, declared, decoded):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    headers = {"Content-Length": declared} if declared else {}
    answer = await client.post("/v1/documents", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert sent <= MOST + 1024
    assert not decoded


async def test_nothing_is_read_of_a_caller_without_a_credential(client):
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    answer = await client.post("/v1/documents", content=never(), headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


async def test_an_upload_is_bounded_by_its_route(client):
    answer = await client.put("/v1/uploads", content=bytes(50 * MOST))
    assert answer.json() == 50 * MOST


async def test_a_path_may_take_more_but_not_everything(client):
    assert (await client.post("/v1/larger", content=document(2**20))).json() == 2**20 - 11
    assert (await client.post("/v1/larger", content=document(2**24 + 1))).status_code == 413
    hostile = b'{"":' + b"[" + b"[]," * 2_000_000 + b"0]}"
    answer = await client.post("/v1/larger", content=hostile)
    assert answer.status_code == 413
    assert "lists; the limit is" in answer.json()["error"]


async def test_requests_without_a_body_are_not_touched(client):
    assert (await client.get("/health/live")).status_code == 200


async def test_a_body_in_tiny_pieces_takes_no_more_than_its_bytes():
    pieces = 100_000

    async def receive() -> dict[str, object]:
        nonlocal pieces
        pieces -= 1
        return {"type": "http.request", "body": b"%02d" % (pieces % 100), "more_body": pieces > 0}

    tracemalloc.start()
    try:
        body = await _read({"headers": []}, receive, 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert body is not None
    assert len(body) == 200_000
    assert peak < 5 * len(body), "of a list of pieces each one takes 40 bytes and more"
