"""Downloads of workers: directly from S3 by signed URLs, checked, and continued in the middle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from services.registry.settings import RegistrySettings
from services.worker.adapters import artifacts
from services.worker.adapters.artifacts import ArtifactCache
from services.worker.adapters.host_cache import HostCache
from tests.integration.kernel.s3 import S3, SERVERS
from tests.integration.registry.conftest import NO_BROKER, TOKEN, serving
from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import replica_token

CONTENT = os.urandom(1_500_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
REPLICA = "digits-v1-a"
TOKEN_OF_REPLICA = replica_token.issue(TOKEN, REPLICA)


@pytest.fixture(params=SERVERS)
def s3(request: pytest.FixtureRequest, s3_at: Callable[[str], S3]) -> S3:
    return s3_at(request.param)


@pytest.fixture
async def registry(tmp_path: Path, s3: S3, sqlite_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A registry on S3 that has CONTENT, and a running replica that may read it."""
    settings = RegistrySettings(
        state_dir=tmp_path,
        service_token=TOKEN,
        database_url=sqlite_url,
        amqp_url=NO_BROKER,
        artifact_url=s3.url,
    )
    async with serving(settings) as http:
        (await http.put("/v1/artifacts", content=CONTENT)).raise_for_status()
        (await http.put("/v1/replicas", json={"artifacts": {REPLICA: DIGEST}})).raise_for_status()
        yield http


async def test_a_worker_downloads_from_the_store_without_credentials(
    registry: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    headers = {"Authorization": f"Bearer {TOKEN_OF_REPLICA}"}
    answer = await registry.get(f"/v1/artifacts/{DIGEST}", headers=headers)
    assert (answer.status_code, answer.content) == (307, b"")
    assert "Signature" in answer.headers["Location"]
    cache = ArtifactCache(HostCache(tmp_path / "cache"))
    path = await cache.fetch(str(registry.base_url), TOKEN_OF_REPLICA, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    path.unlink()
    path.with_suffix(".part").write_bytes(CONTENT[:1_000_000])
    await cache.fetch(str(registry.base_url), TOKEN_OF_REPLICA, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    # Callers who are no replicas get the bytes themselves.
    assert (await registry.get(f"/v1/artifacts/{DIGEST}")).content == CONTENT
    straight = await registry.get(f"/v1/artifacts/{DIGEST}?redirect=false", headers=headers)
    assert straight.content == CONTENT


async def test_a_changed_byte_is_refused(
    registry: httpx.AsyncClient, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(artifacts, "TRIES", 2)
    store = object_store.opened(s3.url)
    place = f"{store.root}/sha256/{DIGEST[:2]}/{DIGEST[2:4]}/{DIGEST}"
    store.files.pipe_file(place, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    cache = ArtifactCache(HostCache(tmp_path / "cache"))
    with pytest.raises(Unavailable, match="the artifact store sent 1500000 bytes with sha256"):
        await cache.fetch(str(registry.base_url), TOKEN_OF_REPLICA, DIGEST, len(CONTENT))
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == [f"{DIGEST}.lock", f"{DIGEST}.use"]


async def test_ranges_and_a_known_etag(registry: httpx.AsyncClient) -> None:
    path = f"/v1/artifacts/{DIGEST}"
    rest = await registry.get(path, headers={"Range": "bytes=1400000-"})
    assert (rest.status_code, rest.content) == (206, CONTENT[1_400_000:])
    assert rest.headers["Content-Range"] == "bytes 1400000-1499999/1500000"
    behind = await registry.get(path, headers={"Range": "bytes=1500000-"})
    assert (behind.status_code, behind.headers["Content-Range"]) == (416, "bytes */1500000")
    assert (await registry.get(path, headers={"Range": "bytes=-5"})).status_code == 200
    known = await registry.get(path, headers={"If-None-Match": f'"{DIGEST}"'})
    assert (known.status_code, known.content) == (304, b"")
