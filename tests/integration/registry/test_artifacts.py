"""Uploads and downloads: streamed, bounded, stored once, and deleted when no version uses them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks import install, places
from services.registry.adapters import artifacts
from services.registry.adapters.artifacts import CHUNK, ArtifactStore
from services.registry.settings import RegistrySettings
from tests.conftest import PATIENCE_S
from tests.integration.kernel.s3 import BUCKET, MOTO, SERVERS
from tests.integration.registry.conftest import NO_BROKER, TOKEN, serving
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import BadRequest, NotFound, PayloadTooLarge, Unavailable


async def pieces(*content: bytes) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece


@pytest.fixture(params=["file", "memory", *SERVERS])
def url(request, tmp_path, s3_at) -> str:
    """A store on the local disk, another one of fsspec, and real S3 servers."""
    if request.param in SERVERS:
        return s3_at(request.param).url
    where = tmp_path / "a b%20c"
    return f"file://{where}" if request.param == "file" else f"memory://{tmp_path.name}"


@pytest.fixture
async def store(url) -> ArtifactStore:
    made = ArtifactStore(url, max_bytes=3 * CHUNK)
    await made.start()
    return made


async def test_bytes_come_back_and_are_stored_once(store):
    content = os.urandom(2 * CHUNK + 17)
    for _ in range(2):
        staged = await store.stage(pieces(content[:100], content[100:]))
        assert (staged.sha256, staged.size) == (hashlib.sha256(content).hexdigest(), len(content))
        await store.keep(staged)
    assert b"".join([piece async for piece in await store.read(staged.sha256)]) == content
    async with store.local(staged.sha256) as path:
        assert path.read_bytes() == content
    await store.remove(staged.sha256)
    await store.remove(staged.sha256)
    with pytest.raises(NotFound):
        await store.read(staged.sha256)
    with pytest.raises(NotFound):
        async with store.local(staged.sha256):
            pass


async def test_a_file_that_is_too_large_for_one_copy_is_stored(store, monkeypatch):
    """S3 copies at most 5 GB in one call."""
    monkeypatch.setattr(artifacts, "COPY_BYTES", CHUNK)
    content = os.urandom(2 * CHUNK + 17)
    staged = await store.stage(pieces(content))
    await store.keep(staged)
    assert b"".join([piece async for piece in await store.read(staged.sha256)]) == content
    assert store._fs.find(store._incoming) == []


@pytest.mark.parametrize("server", SERVERS)
async def test_wrong_bytes_leave_no_unfinished_multipart_upload(s3_at, server):
    """They have no name in the bucket, but their owner pays for them."""
    if not install.installed(MOTO):
        pytest.skip(f"boto3, which lists the uploads, is missing: python -m benchmarks.install --only {MOTO}")
    s3 = s3_at(server)
    store = ArtifactStore(s3.url, max_bytes=1 << 30)
    content = os.urandom(object_store.PART + CHUNK)
    part = await store.do(store.parts.write, "u1", 0, content)
    right, wrong = hashlib.sha256(content).hexdigest(), hashlib.sha256(b"").hexdigest()
    assert await store.assemble("u1", [part], wrong, len(content)) == right
    assert not await store.has(wrong)
    assert await asyncio.to_thread(_unfinished_uploads) == [[], ["proof"]]
    assert await store.assemble("u1", [part], right, len(content)) == right
    assert b"".join([piece async for piece in await store.read(right)]) == content


def _unfinished_uploads() -> list[list[str]]:
    """Return the names of the unfinished uploads, and again after one more has begun."""
    program = (
        "import boto3, json; s3 = boto3.client('s3'); bucket = {'Bucket': '" + BUCKET + "'}\n"
        "def listed(): return [u['Key'] for u in s3.list_multipart_uploads(**bucket).get('Uploads', [])]\n"
        "before = listed(); s3.create_multipart_upload(**bucket, Key='proof')\n"
        "print(json.dumps([before, listed()]))"
    )
    command = [str(places.python(MOTO)), "-c", program]
    found: list[list[str]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


async def test_too_large_empty_and_cut_off_uploads_leave_nothing(store):
    async def breaks_off() -> AsyncIterator[bytes]:
        yield b"x" * CHUNK
        raise ConnectionResetError

    with pytest.raises(PayloadTooLarge):
        await store.stage(pieces(*[b"x" * CHUNK] * 4))
    with pytest.raises(PayloadTooLarge):
        await store.stage(pieces(), announced=3 * CHUNK + 1)
    with pytest.raises(BadRequest, match="empty"):
        await store.stage(pieces())
    with pytest.raises(ConnectionResetError):
        await store.stage(breaks_off())
    assert store._fs.find(store._incoming) == []
    assert await store.sweep() == 0


async def test_orphans_of_a_crash_are_swept(tmp_path):
    store = ArtifactStore(f"file://{tmp_path}/artifacts", max_bytes=CHUNK)
    await store.start()
    old, fresh = (tmp_path / "artifacts" / "incoming" / name for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    assert await store.sweep() == 1
    assert fresh.exists()
    assert not old.exists()


async def test_store_that_cannot_be_written_is_a_health_problem(tmp_path):
    store = ArtifactStore(f"file://{tmp_path}/artifacts", max_bytes=CHUNK)
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    await store.probe()
    assert "artifact store has failed" in (store.problem or "")
    (tmp_path / "artifacts").unlink()
    await store.probe()
    assert store.problem is None


async def test_an_upload_that_no_version_uses_is_deleted_later(call):
    kept = await call.upload(onnx_bytes(1))
    await call.register("digits", onnx_bytes(2))
    await call("DELETE", "/v1/models/digits?permanent=true")
    assert call.stored() == [kept], "its sender may be about to register it"
    call.clock.forward(3601)
    await call.register("digits", onnx_bytes(3))
    await call("DELETE", "/v1/models/digits?permanent=true")
    assert call.stored() == []
    assert (
        "Upload it"
        in (
            await call(
                "POST", "/v1/models/digits/versions", {"artifact": kept, "filename": "m.onnx"}, status=400
            )
        )["error"]
    )


async def test_wrong_digest_is_refused(call):
    answer = await call.http.put(f"/v1/artifacts?sha256={'0' * 64}", content=b"bytes")
    assert answer.status_code == 400
    assert "Send the file again" in answer.json()["error"]
    assert call.stored() == []
    assert call.incoming() == []


@pytest.fixture
async def served(tmp_path, database_url) -> AsyncIterator[httpx.AsyncClient]:
    """The registry behind a real server, with a limit of 4 MiB."""
    settings = RegistrySettings(
        state_dir=tmp_path,
        service_token=TOKEN,
        database_url=database_url,
        amqp_url=NO_BROKER,
        max_artifact_bytes=4 * CHUNK,
        max_api_body_bytes=64 * 1024,
    )
    async with serving(settings) as http:
        yield http


async def test_over_a_real_connection(served):
    content = os.urandom(3 * CHUNK + 5)
    answer = await served.put(
        "/v1/artifacts", content=pieces(*[content[i : i + 70_000] for i in range(0, len(content), 70_000)])
    )
    assert answer.status_code == 201
    digest = answer.json()["sha256"]
    head = await served.head(f"/v1/artifacts/{digest}")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(content)))
    async with served.stream("GET", f"/v1/artifacts/{digest}") as download:
        assert download.headers["content-length"] == str(len(content))
        assert hashlib.sha256(await download.aread()).hexdigest() == digest
    assert (await served.head(f"/v1/artifacts/{'0' * 64}")).status_code == 404
    assert (await served.get("/v1/artifacts/..%2f..%2fetc")).status_code == 404


async def test_limit_holds_while_streaming(served, tmp_path):
    """The refusal arrives while the sender is still sending, and names the limit."""
    reader, writer = await asyncio.open_connection(served.base_url.host, served.base_url.port)
    head = f"PUT /v1/artifacts HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(5):
        writer.write(b"%x\r\n" % CHUNK + b"x" * CHUNK + b"\r\n")
        await writer.drain()
    assert b" 413 " in await reader.readline()
    writer.close()
    answer = await served.put("/v1/artifacts", content=pieces(*[b"x" * CHUNK] * 5))
    assert answer.status_code == 413
    assert "TIDEGATE_MAX_ARTIFACT_BYTES" in answer.json()["error"]
    announced = await served.put("/v1/artifacts", content=b"x" * (4 * CHUNK + 1))
    assert announced.status_code == 413
    assert list((tmp_path / "data" / "artifacts" / "incoming").iterdir()) == []


async def test_a_sender_that_disconnects_leaves_nothing(served, tmp_path):
    incoming = tmp_path / "data" / "artifacts" / "incoming"
    _, writer = await asyncio.open_connection(served.base_url.host, served.base_url.port)
    head = f"PUT /v1/artifacts HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    writer.write(f"{head}Content-Length: {3 * CHUNK}\r\n\r\n".encode() + b"x" * CHUNK)
    async with asyncio.timeout(PATIENCE_S):
        while not list(incoming.iterdir()):
            await asyncio.sleep(0.01)
        writer.close()
        while list(incoming.iterdir()):
            await asyncio.sleep(0.01)


async def test_a_store_that_refuses_access_is_unavailable(s3_at, monkeypatch):
    """A driver's own errors are no OSErrors, and must not become 500 `unexpected error`."""
    s3 = s3_at("rclone")  # moto accepts every credential
    store = ArtifactStore(s3.url, max_bytes=CHUNK)
    await store.start()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.forget_clients()
    refused = ArtifactStore(s3.url, max_bytes=CHUNK)
    with pytest.raises(Unavailable, match="The artifact store has failed"):
        await refused.read("0" * 64)
    await refused.probe()
    assert refused.problem is not None
    s3.forget_clients()


async def test_a_document_has_a_limit_that_an_upload_does_not_have(served):
    """A document is refused while it is still being sent; an artifact may be larger than any document."""
    limit = 64 * 1024
    answer = await served.put("/v1/artifacts", content=os.urandom(2 * limit))
    assert answer.status_code == 201
    reader, writer = await asyncio.open_connection(served.base_url.host, served.base_url.port)
    head = f"POST /v1/apply HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"%x\r\n" % (limit + 1) + b" " * (limit + 1) + b"\r\n")  # and no end
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 60)
    writer.close()
    declared = await served.post("/v1/apply", content=b"[" * (limit + 1))
    assert declared.status_code == 413
    assert declared.json()["error"] == f"the body is larger than the {limit} bytes that this path accepts"
