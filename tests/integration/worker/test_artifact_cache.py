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
from services.worker.adapters.host_cache import HostCache
from tidegate.kernel.errors import NotFound, Unavailable

pytestmark = pytest.mark.integration

CONTENT = bytes(range(256)) * 20_000
CUT = CONTENT[: len(CONTENT) // 2]  # with the length of the whole: the connection breaks
DIGEST = hashlib.sha256(CONTENT).hexdigest()
TOKEN = "token"


class Registry(http.server.ThreadingHTTPServer):
    """A server of CONTENT under its digest. The first requests get the ``troubles``, one each.

    With ``store``, it redirects to that address. With ``ranges``, it sends the bytes from a Range on.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: list[int | bytes] = []
        self.served = 0
        self.store = ""
        self.ranges = False
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that close the connection, which a test does on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        trouble = self.server.troubles.pop(0) if self.server.troubles else 200
        body = trouble if isinstance(trouble, bytes) else CONTENT
        status = trouble if isinstance(trouble, int) else 200
        path, _, query = self.path.partition("?")
        self.server.asked.append((self.path, self.headers["Authorization"], self.headers["Range"]))
        if path == "/store":
            assert "Authorization" not in self.headers
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        elif path != f"/v1/artifacts/{DIGEST}":
            status = 404
        elif self.server.store and query != "redirect=false":
            status, body = 307, b""
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if self.server.ranges else 0
        self.server.served += 1
        self.send_response(206 if start and status == 200 else status)
        self.send_header("Content-Length", str(len(CONTENT if body is CUT else body) - start))
        if start and status == 200:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Location", self.server.store)
        self.end_headers()
        self.wfile.write(body[start:])

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
    return ArtifactCache(HostCache(tmp_path / "cache"))


async def test_fetched_once_and_served_with_the_registry_down(
    registry: Registry, cache: ArtifactCache
) -> None:
    paths = await asyncio.gather(*(cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT)) for _ in range(4)))
    assert registry.served == 1
    assert paths[0].read_bytes() == CONTENT
    assert await cache.fetch("http://127.0.0.1:9", TOKEN, DIGEST, len(CONTENT)) == paths[0]


async def test_unused_artifacts_make_room_for_a_new_one(registry: Registry, tmp_path: Path) -> None:
    """Two other artifacts are in the cache, and only one of them is still needed beside the new one."""
    used, unused = tmp_path / ("1" * 64), tmp_path / ("2" * 64)
    cache = HostCache(tmp_path, max_bytes=2 * len(CONTENT))
    for path in (unused, used):
        path.write_bytes(CONTENT)
        path.with_suffix(".use").touch()
    cache.use(used)
    path = await ArtifactCache(cache).fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == used.read_bytes() == CONTENT
    assert not unused.exists()


async def test_troubles_are_tried_again(registry: Registry, cache: ArtifactCache) -> None:
    registry.troubles = [503, CONTENT[:-1], bytes(len(CONTENT)), CONTENT + b"more"]
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert registry.served == 5
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        DIGEST, f"{DIGEST}.lock", f"{DIGEST}.ok", f"{DIGEST}.use",
    ]  # fmt: skip


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


async def test_it_continues_where_the_connection_broke(registry: Registry, cache: ArtifactCache) -> None:
    registry.ranges = True
    registry.troubles = [CUT]
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    (_, _, first), (_, _, second) = registry.asked
    assert first is None
    assert second is not None
    assert 0 < int(second[6:-1]) <= len(CUT)


async def test_a_part_of_an_earlier_worker_is_used_and_a_wrong_one_is_not(
    registry: Registry, cache: ArtifactCache, tmp_path: Path
) -> None:
    registry.ranges = True
    part = tmp_path / "cache" / f"{DIGEST}.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert registry.asked[0][2] == "bytes=1000-"
    (tmp_path / "cache" / DIGEST).unlink()
    part.write_bytes(bytes(1000))
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert registry.asked[-1][2] is None, "a wrong part is dropped as a whole"


async def test_a_redirect_gets_no_token(registry: Registry, cache: ArtifactCache) -> None:
    registry.store = f"{registry.url}/store?signature=x"
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert [(path, token) for path, token, _ in registry.asked] == [
        (f"/v1/artifacts/{DIGEST}", f"Bearer {TOKEN}"),
        ("/store?signature=x", None),
    ]


@pytest.mark.parametrize("store", ["http://127.0.0.1:9/store", "/absent"])
async def test_a_store_that_does_not_answer_is_left_out(
    registry: Registry, cache: ArtifactCache, store: str
) -> None:
    """A worker may be in another network than the store: it asks the registry for the bytes."""
    registry.store = store
    path = await cache.fetch(registry.url, TOKEN, DIGEST, len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert registry.asked[-1][0] == f"/v1/artifacts/{DIGEST}?redirect=false"
