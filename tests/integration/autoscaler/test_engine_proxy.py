"""Test the proxy of the engine: it rejects callers without the autoscaler's token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.autoscaler.adapters.docker.engine import Engine
from services.autoscaler.api.engine_proxy import EngineProxy
from services.autoscaler.domain.engine_rules import StackBounds
from services.autoscaler.engine_proxy_wiring import token_of
from services.autoscaler.settings import AutoscalerSettings
from tidegate.kernel.protocol.access import engine_token

pytestmark = pytest.mark.integration

BOUNDS = StackBounds("stack", ("image",), "none")
TOKEN = engine_token("service-token")


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server at a Unix socket that accepts every request and records it."""
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK")
        writer.close()

    path = str(tmp_path / "engine.sock")
    server = await asyncio.start_unix_server(answer, path)
    yield path, seen
    server.close()


def client_of(path: str, token: str | None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(EngineProxy(BOUNDS, path, token))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:2375")


async def test_without_the_token_nothing_reaches_the_engine(engine):
    path, seen = engine
    async with client_of(path, TOKEN) as client:
        for headers in ({}, {"Authorization": "Bearer service-token"}, {"Authorization": f"Bearer {TOKEN}x"}):
            for method, target in (("GET", "/version"), ("POST", "/v1.47/containers/create?name=x")):
                answer = await client.request(method, target, headers=headers)
                assert answer.status_code == 401, target
                assert "token" in answer.json()["message"]
        assert seen == []
        ours = {"Authorization": f"Bearer {TOKEN}"}
        assert (await client.get("/version", headers=ours)).status_code == 200
        assert (await client.get("/_ping")).status_code == 200, "a health check has no token"
        assert [line.split()[1].rstrip(b"?") for line in seen] == [b"/version", b"/_ping"]
        refused = await client.post("/v1.47/containers/create?name=x", headers=ours, json={})
        assert refused.status_code == 403, "the rules judge the autoscaler, too"


async def test_on_a_network_of_their_own_it_answers_without(engine):
    path, _ = engine
    async with client_of(path, None) as client:
        assert (await client.get("/version")).status_code == 200


def test_it_does_not_start_without_a_token_unless_told_so(tmp_path, monkeypatch):
    monkeypatch.delenv("TIDEGATE_SERVICE_TOKEN", raising=False)
    assert token_of(AutoscalerSettings(state_dir=tmp_path, service_token="service-token")) == TOKEN
    assert token_of(AutoscalerSettings(state_dir=tmp_path, engine_proxy_open=True)) is None
    with pytest.raises(SystemExit, match="TIDEGATE_ENGINE_PROXY_OPEN"):
        token_of(AutoscalerSettings(state_dir=tmp_path))


async def test_the_launchers_client_sends_the_token_from_its_first_call_on():
    seen: list[tuple[bytes, bool]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append((head.split()[1], f"Authorization: Bearer {TOKEN}".encode() in head))
        body = b'{"ApiVersion": "1.47", "Id": "x"}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    engine = Engine(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", TOKEN)
    try:
        await engine.inspect("x")
    finally:
        engine.close()
        server.close()
    assert seen == [(b"/version", True), (b"/v1.47/containers/x/json", True)]
