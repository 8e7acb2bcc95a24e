"""Signatures of artifacts: kept by the registry, and checked by a worker over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from services.worker.adapters import signatures
from tests.integration.registry.conftest import TOKEN, Caller, Open
from tests.integration.registry.onnx_files import onnx_bytes
from tests.integration.registry.test_replicas import REPLICA, as_replica, running
from tests.unit.kernel.model_signing_files import FOLDER, KEY_ID, ONE_FILE, PUBLIC_KEY
from tests.unit.kernel.test_signing import FILES, HI, archive, private_key
from tidegate.kernel import signing
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import replica_token

pytestmark = pytest.mark.integration


@pytest.fixture
def known(tmp_path: Path) -> Path:
    path = tmp_path / "known.pub"
    path.write_text(PUBLIC_KEY)
    return path


async def test_signatures_are_kept_with_their_artifact(call: Caller, tmp_path: Path) -> None:
    sha256 = await call.upload(HI)
    address = f"/v1/artifacts/{sha256}/signatures"
    await call("GET", f"/v1/artifacts/{'0' * 64}/signatures", status=404)
    await call("POST", f"/v1/artifacts/{'0' * 64}/signatures", ONE_FILE, status=404)
    assert (await call("GET", address))["items"] == []
    for _ in range(2):  # the second one replaces the first
        assert (await call("POST", address, ONE_FILE, status=201))["key"] == KEY_ID
    own = signing.sign("m", {".": sha256}, private_key(tmp_path / "own.pem"))
    call.clock.forward(1)
    second = (await call("POST", address, own, status=201))["key"]
    found = (await call("GET", address))["items"]
    assert [(each["key"], each["bundle"]) for each in found] == [(KEY_ID, ONE_FILE), (second, own)]
    await call("DELETE", f"{address}/{second}")
    await call("DELETE", f"{address}/{second}", status=404)
    (entry,) = (await call("GET", "/v1/audit", params={"kind": "artifact", "limit": 1}))["items"]
    assert (entry["name"], entry["before"]) == (sha256, {"signed_by": second})


async def test_a_signature_of_other_files_is_refused(call: Caller, tmp_path: Path) -> None:
    sha256 = await call.upload(b"ho\n")
    answer = await call("POST", f"/v1/artifacts/{sha256}/signatures", ONE_FILE, status=400)
    assert answer["reason"] == "bad_signature"
    assert "is not the signed one" in answer["error"]
    assert (
        "cannot be read"
        in (await call("POST", f"/v1/artifacts/{sha256}/signatures", {}, status=400))["error"]
    )
    packed = archive(tmp_path / "m.tar.gz", FILES)
    await call(
        "POST", f"/v1/artifacts/{await call.upload(packed.read_bytes())}/signatures", FOLDER, status=201
    )


async def test_signatures_are_deleted_with_their_artifact(call: Caller, tmp_path: Path) -> None:
    content = onnx_bytes()
    version = await call.register("m", content)
    bundle = signing.sign("m", {".": version["artifact_sha256"]}, private_key(tmp_path / "own.pem"))
    address = f"/v1/artifacts/{version['artifact_sha256']}/signatures"
    await call("POST", address, bundle, status=201)
    call.clock.forward(7200)
    await call("DELETE", "/v1/models/m?permanent=true")
    await call("GET", address, status=404)
    assert await call.upload(content) == version["artifact_sha256"]
    assert (await call("GET", address))["items"] == []


async def test_a_registry_with_trusted_keys_takes_no_others(
    opened: Open, known: Path, tmp_path: Path
) -> None:
    async with opened(trusted_keys=known) as call:
        sha256 = await call.upload(HI)
        own = signing.sign("m", {".": sha256}, private_key(tmp_path / "own.pem"))
        address = f"/v1/artifacts/{sha256}/signatures"
        assert "TIDEGATE_TRUSTED_KEYS" in (await call("POST", address, own, status=400))["error"]
        await call("POST", address, ONE_FILE, status=201)


@contextlib.asynccontextmanager
async def served(call: Caller) -> AsyncIterator[str]:
    transport = call.http._transport
    assert isinstance(transport, httpx.ASGITransport)
    server = uvicorn.Server(uvicorn.Config(transport.app, port=0, lifespan="off", log_level="warning"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await task


async def test_a_worker_loads_only_what_a_key_on_its_host_has_signed(
    call: Caller, known: Path, tmp_path: Path
) -> None:
    file = tmp_path / "artifact"
    file.write_bytes(HI)
    sha256 = await call.upload(HI)
    await running(call, digits_v1_0_1=sha256)
    token = replica_token.issue(TOKEN, REPLICA)
    await call("POST", f"/v1/artifacts/{sha256}/signatures", {}, status=403, **as_replica())
    other = signing.sign("m", {".": sha256}, private_key(tmp_path / "other.pem"))
    async with served(call) as url:
        with pytest.raises(ModelFailed, match="the artifact has no signature"):
            await signatures.check(url, token, file, sha256, known)
        await call("POST", f"/v1/artifacts/{sha256}/signatures", other, status=201)
        with pytest.raises(ModelFailed, match="the key is not trusted"):
            await signatures.check(url, token, file, sha256, known)
        await call("POST", f"/v1/artifacts/{sha256}/signatures", ONE_FILE, status=201)
        assert await signatures.check(url, token, file, sha256, known) == KEY_ID
        changed = hashlib.sha256(b"hi!").hexdigest()
        file.write_bytes(b"hi!")
        await running(call, digits_v1_0_1=await call.upload(b"hi!"))
        with pytest.raises(ModelFailed, match="the artifact has no signature"):
            await signatures.check(url, token, file, changed, known)
        with pytest.raises(ModelFailed, match="No such file"):
            await signatures.check(url, token, file, changed, tmp_path / "gone.pem")
