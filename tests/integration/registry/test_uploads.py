"""Uploads that are continued after a lost connection or a restart; checked, bounded and swept."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from services.registry.domain import uploads
from tests.integration.registry.conftest import Caller, Open
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import Principal


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Bytes of five parts, the last of which is small. Parts are smaller than usual."""
    monkeypatch.setattr(uploads, "PART_BYTES", 300_000)
    monkeypatch.setattr(uploads, "LEAST_PART_BYTES", 100_000)
    return os.urandom(4 * 300_000 + 17)


@pytest.fixture
def settings(artifact_url: str) -> dict[str, Any]:
    return {"artifact_url": artifact_url}


def document(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


async def send(call: Caller, upload: dict[str, Any], data: Any, *, status: int = 200) -> Any:
    headers = {"Upload-Offset": str(upload["offset"])}
    answer = await call.http.patch(f"/v1/uploads/{upload['id']}", content=data, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_an_upload_survives_its_sender_and_the_registry(
    opened: Open, settings: dict[str, Any], content: bytes
) -> None:
    async def breaks_off() -> AsyncIterator[bytes]:
        yield content[300_000 : 300_000 + 450_000]
        raise ClientDisconnect

    async with opened(**settings) as call:
        upload = await call("POST", "/v1/uploads", document(content), status=201)
        upload = await send(call, upload, content[:300_000])
        assert (upload["offset"], upload["state"]) == (300_000, "open")
        await send(call, upload, breaks_off(), status=400)
    async with opened(**settings) as call:
        known = await call("POST", "/v1/uploads", document(content), status=200)
        assert known["id"] == upload["id"]
        assert known["offset"] == 750_000, "a cut-off part of some size stays"
        sent = await send(call, known, content[750_000:])
        assert sent["state"] == "verifying"
    async with opened(**settings) as call:  # it restarts before it has checked the bytes
        done = await call("GET", f"/v1/uploads/{upload['id']}")
        assert (done["state"], done["offset"]) == ("stored", len(content))
        answer = await call.http.get(f"/v1/artifacts/{document(content)['sha256']}")
        assert answer.content == content
        again = await call("POST", "/v1/uploads", document(content), status=200)
        assert again["state"] == "stored"
        assert await call.store.do(call.store.parts.listed) == set()


async def test_wrong_bytes_never_become_an_artifact(
    opened: Open, settings: dict[str, Any], content: bytes
) -> None:
    async with opened(**settings) as call:
        upload = await call("POST", "/v1/uploads", document(content), status=201)
        upload = await send(call, upload, content[:-1] + bytes([content[-1] ^ 1]))
        failed = await call("GET", f"/v1/uploads/{upload['id']}")
        assert failed["state"] == "failed"
        assert "Send the file again" in failed["problem"]
        sha256 = document(content)["sha256"]
        assert (await call.http.head(f"/v1/artifacts/{sha256}")).status_code == 404
        assert not await call.store.has(sha256)
        await send(call, failed, b"", status=409)
        new = await call("POST", "/v1/uploads", document(content), status=201)
        assert new["offset"] == 0


async def test_two_connections_continue_one_upload(call: Caller, content: bytes) -> None:
    """The slower one is told where the upload is now."""
    upload = await call("POST", "/v1/uploads", document(content), status=201)
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield content[:200_000]
        begun.set()  # the registry asks for more, so it has this request
        await go.wait()
        yield content[200_000:300_000]

    late = asyncio.create_task(send(call, upload, slow(), status=409))
    await begun.wait()
    now = await send(call, upload, content[:600_000])
    go.set()
    assert (await late)["reason"] == "wrong_offset"
    await send(call, now, content[600_000:])
    assert (await call("GET", f"/v1/uploads/{upload['id']}"))["state"] == "stored"


async def test_what_is_wrong_with_a_part_is_said(call: Caller, content: bytes) -> None:
    upload = await call("POST", "/v1/uploads", document(content), status=201)
    wrong = await send(call, {**upload, "offset": 7}, b"x", status=409)
    assert "Continue at 0, not at 7" in wrong["error"]
    small = await send(call, upload, b"x" * 1000)
    assert small["offset"] == 0, "many small parts would be expensive"
    assert "opened for" in (await send(call, upload, content + b"x", status=400))["error"]

    async def unannounced() -> AsyncIterator[bytes]:
        yield content
        yield b"x"

    assert "opened for" in (await send(call, upload, unannounced(), status=400))["error"]
    answer = await call.http.patch(f"/v1/uploads/{upload['id']}", content=b"x")
    assert (answer.status_code, "upload-offset" in answer.text) == (400, True)
    assert "may have expired" in (await call("GET", "/v1/uploads/absent", status=404))["error"]
    other = Principal("k1", "other", frozenset({access.PUBLISH}))
    stranger = {access.PRINCIPAL_HEADER.decode(): other.to_header()}
    await call("GET", f"/v1/uploads/{upload['id']}", status=404, headers=stranger)
    assert (await call("GET", "/v1/uploads", headers=stranger))["items"] == []
    await call("DELETE", f"/v1/uploads/{upload['id']}", status=204)
    assert (await call("GET", "/v1/uploads"))["items"] == []


async def test_unfinished_uploads_are_bounded_and_swept(opened: Open, content: bytes) -> None:
    async with opened(max_uploads_per_caller=2, max_upload_bytes_per_caller=3 * len(content)) as call:
        first = await call("POST", "/v1/uploads", document(content), status=201)
        await send(call, first, content[:300_000])
        much = {"sha256": "0" * 64, "size": 2 * len(content) + 1}
        assert "MAX_UPLOAD_BYTES" in (await call("POST", "/v1/uploads", much, status=429))["error"]
        await call("POST", "/v1/uploads", {"sha256": "0" * 64, "size": 1}, status=201)
        one_more = {"sha256": "1" * 64, "size": 1}
        assert "MAX_UPLOADS_PER" in (await call("POST", "/v1/uploads", one_more, status=429))["error"]
        large = {"sha256": "1" * 64, "size": 2**62}
        await call("POST", "/v1/uploads", large, status=413)
        parts = call.store.parts
        assert parts.listed() == {first["id"]}
        call.clock.forward(86_401)
        await call.uploads.sweep()
        assert (await call("GET", "/v1/uploads"))["items"] == []
        assert parts.listed() == set()


async def test_a_store_that_fails_at_the_check_is_tried_again(
    opened: Open, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as call:
        upload = await call("POST", "/v1/uploads", document(content), status=201)
        await send(call, upload, content)
        store = call.store
        with monkeypatch.context() as patched:
            patched.setattr(store._fs, "exists", lambda _: 1 / 0)
            await call("GET", f"/v1/uploads/{upload['id']}", status=503)
        assert (await call("GET", f"/v1/uploads/{upload['id']}"))["state"] == "stored"


async def test_an_uploaded_artifact_is_registered(opened: Open, settings: dict[str, Any]) -> None:
    content = onnx_bytes(1)
    async with opened(**settings) as call:
        upload = await call("POST", "/v1/uploads", document(content), status=201)
        await send(call, upload, content)
        await call("GET", f"/v1/uploads/{upload['id']}")
        body = {"artifact": document(content)["sha256"], "filename": "model.onnx"}
        version = await call("POST", "/v1/models/digits/versions", body, status=201)
        assert version["artifact_size"] == len(content)
        await call("DELETE", "/v1/models/digits?permanent=true")
        assert not await call.store.has(document(content)["sha256"])
