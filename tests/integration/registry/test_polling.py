"""The registry does not send an unchanged desired state again to the router and the autoscaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from services.autoscaler.adapters.registry.client import RegistryClient
from services.registry.api import desired_state as api
from services.registry.settings import RegistrySettings
from services.router.adapters.registry_cache import RegistryCache
from tests.integration.registry.conftest import NO_BROKER, TOKEN, serving
from tests.integration.registry.onnx_files import onnx_bytes

PATH = "/v1/desired-state"
DEPLOYMENT = "/v1/deployments/digits-v1"
VERSION = "/v1/models/digits/versions/1"
ENDPOINT = {"targets": [{"deployment": "digits-v1"}], "default_timeout_ms": 500}


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str) -> RegistrySettings:
    """The settings of a registry on an empty SQLite database."""
    return RegistrySettings(
        state_dir=tmp_path,
        service_token=TOKEN,
        database_url=sqlite_url,
        amqp_url=NO_BROKER,
        verification="off",
    )


async def test_the_etag_changes_whenever_the_desired_state_changes(call):
    etag, content = "", b""

    async def changes(method: str = "GET", path: str = PATH, body: Any = None) -> bool:
        """Send a request. Return True if the desired state differs afterwards. Then its ETag must differ."""
        nonlocal etag, content
        if method != "GET":
            await call(method, path, body)
        conditional = await call.http.get(PATH, headers={"If-None-Match": etag} if etag else {})
        whole = await call.http.get(PATH)
        changed = whole.content != content
        assert conditional.status_code == 200 or (not changed and conditional.content == b"")
        assert conditional.headers["ETag"] == whole.headers["ETag"]
        etag, content = whole.headers["ETag"], whole.content
        return changed

    assert await changes()
    await call.register("digits", onnx_bytes())
    await changes()
    assert await changes("POST", "/v1/deploy", {"model": "digits"})
    assert not await changes()
    assert (await call.http.get(PATH, headers={"If-None-Match": f'W/{etag}, "other"'})).status_code == 304
    assert (await call.http.get("/v1/intention", headers={"If-None-Match": etag})).status_code == 304
    assert await changes("PATCH", VERSION, {"metadata": {"tags": {"team": "x"}}})
    assert await changes("PUT", "/v1/models/digits/aliases/champion", {"version": 1})
    assert await changes("DELETE", "/v1/models/digits/aliases/champion")
    assert await changes("PUT", "/v1/endpoints/digits", ENDPOINT)
    assert await changes("PUT", f"{DEPLOYMENT}/override", {"replicas": 4, "ttl_s": 60})
    call.clock.forward(59)
    assert not await changes()
    call.clock.forward(2)
    assert await changes(), "the override has expired, and nothing was written"
    assert await changes("PUT", f"{DEPLOYMENT}/override", {"replicas": 3})
    assert await changes("DELETE", f"{DEPLOYMENT}/override")
    await call.register("digits", onnx_bytes(2))
    assert await changes("POST", "/v1/deploy", {"model": "digits", "version": 2})


async def test_a_database_without_its_last_revision(tmp_path: Path, settings: RegistrySettings) -> None:
    """A standby takes over without the last revision, and the next change gets the same number."""
    database = tmp_path / "data" / "registry.db"
    async with serving(settings) as http:
        artifact = (await http.put("/v1/artifacts", content=onnx_bytes())).json()["sha256"]
    standby = database.read_bytes()
    found = []
    for model in ("lost", "kept"):
        async with serving(settings) as http:
            body = {"artifact": artifact, "filename": "model.onnx"}
            (await http.post(f"/v1/models/{model}/versions", json=body)).raise_for_status()
            found.append(await http.get(PATH))
        for file in database.parent.glob("registry.db-*"):
            file.unlink()
        database.write_bytes(standby)
    lost, kept = found
    assert lost.json()["revision"] == kept.json()["revision"]
    assert lost.headers["ETag"] != kept.headers["ETag"]


async def test_pollers_keep_what_they_have_read(
    tmp_path: Path, settings: RegistrySettings, monkeypatch
) -> None:
    codes: list[int] = []

    async def note(response: httpx.Response) -> None:
        codes.append(response.status_code)

    async with serving(settings) as http:
        address = str(http.base_url)
        autoscaler, router = RegistryClient(address, TOKEN), RegistryCache(address, TOKEN, tmp_path / "copy")
        for client in (autoscaler._http, router._client):
            client.event_hooks["response"].append(note)

        async def poll() -> list[int]:
            """Let both read the desired state. Return the status codes, and check what they have then."""
            codes.clear()
            desired = await autoscaler.desired_state()
            await router.refresh()
            whole = (await http.get(PATH)).json()
            assert desired.model_dump(mode="json") == whole
            assert router.desired is not None
            assert router.desired.model_dump(mode="json") == whole
            assert router.problem is None
            return list(codes)

        assert await poll() == [200, 200]
        assert await poll() == [304, 304]
        artifact = (await http.put("/v1/artifacts", content=onnx_bytes())).json()["sha256"]
        body = {"artifact": artifact, "filename": "model.onnx"}
        (await http.post("/v1/models/digits/versions", json=body)).raise_for_status()
        (await http.post("/v1/deploy", json={"model": "digits"})).raise_for_status()
        assert await poll() == [200, 200]
        assert await poll() == [304, 304]
        monkeypatch.setattr(api, "_PROCESS", "of the next process")
        assert await poll() == [200, 200], "a new process may have a restored database"
        assert await poll() == [304, 304]
        await autoscaler.close()
        await router.close()
