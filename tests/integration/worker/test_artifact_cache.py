"""Artifacts over real HTTP: complete, checked, and available while the registry is down."""

import asyncio
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.worker.adapters import artifacts
from services.worker.adapters.artifacts import ArtifactCache
from tidegate.kernel.errors import NotFound, Unavailable

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 20_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
TOKEN = "token"


class Registry(http.server.ThreadingHTTPServer):
    """A server of CONTENT under its digest. The first requests get the ``troubles``, one each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: list[int | bytes] = []
        self.served = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that close the connection, which a test does on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        trouble = self.server.troubles.pop(0) if self.server.troubles else 200
        body = trouble if isinstance(trouble, bytes) else CONTENT
        status = trouble if isinstance(trouble, int) else 200
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        elif self.path != f"/v1/artifacts/{DIGEST}":
            status = 404
        self.server.served += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(artifacts, "FIRST_PAUSE_S", 0.01)
    server = Registry()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache")


async def test_fetched_once_and_served_with_the_registry_down(
    registry: Registry, cache: ArtifactCache
) -> None:
    paths = await asyncio.gather(*(cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT)) for _ in range(4)))
    assert registry.served == 1
    assert paths[0].read_bytes() == CONTENT
    assert await cache.fetch("http://127.0.0.1:9", TOKEN, DIGEST, len(CONTENT)) == paths[0]


async def test_troubles_are_tried_again(registry: Registry, cache: ArtifactCache) -> None:
    registry.troubles = [503, CONTENT[:-1], bytes(len(CONTENT)), CONTENT + b"more"]
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert registry.served == 5
    assert sorted(entry.name for entry in path.parent.iterdir()) == [DIGEST, f"{DIGEST}.lock", f"{DIGEST}.ok"]


async def test_a_damaged_copy_is_fetched_again(registry: Registry, cache: ArtifactCache) -> None:
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    path.chmod(0o600)
    path.write_bytes(bytes(len(CONTENT)))
    assert (await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))).read_bytes() == CONTENT
    assert registry.served == 2


async def test_it_gives_up_with_the_reason(registry: Registry, cache: ArtifactCache) -> None:
    registry.troubles = [500] * 10
    with pytest.raises(Unavailable, match="answered 500"):
        await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert registry.served == artifacts.TRIES


async def test_what_cannot_help_is_not_tried_again(registry: Registry, cache: ArtifactCache) -> None:
    with pytest.raises(NotFound):
        await cache.fetch(registry.url, TOKEN, "0" * 64, 1)
    assert registry.served == 1


async def test_a_registry_that_does_not_know_the_replica_yet_is_asked_again(
    registry: Registry, cache: ArtifactCache
) -> None:
    """A registry that has just started learns within seconds which replicas run."""
    with pytest.raises(Unavailable, match="does not know this replica's token"):
        await cache.fetch(registry.url, "other", DIGEST, len(CONTENT))
    assert registry.served == artifacts.TRIES
