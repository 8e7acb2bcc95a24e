"""Cache artifacts on this host by sha256, so that replicas can start while the registry is down."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from services.worker.adapters.file_lock import exclusive
from services.worker.adapters.host_cache import HostCache
from tidegate.kernel import telemetry
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.http.certificates import trusted

log = telemetry.logger(__name__)

CHUNK = 1024 * 1024
READ_ONLY = 0o444
TRIES = 6
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class ArtifactCache:
    """The artifacts in ``cache``, which the workers of one host share.

    The file ``<sha256>`` is an artifact. When the artifact's digest is right, the file's size, modification
    time and inode are written to ``<sha256>.ok``. The digest is checked again only if one of these three has
    changed, because the check of a large file is slow.
    """

    def __init__(self, cache: HostCache) -> None:
        self._cache = cache
        self._folder = cache.folder

    async def fetch(self, registry_url: str, token: str, sha256: str, size: int) -> Path:
        """Return the artifact as a local file. Download it if the cache has no complete copy.

        The file is protected from deletion until the cache is closed. A download raises NotFound if the
        registry does not have the artifact. It raises Unavailable if the registry cannot be reached, or if
        the received bytes are wrong.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / sha256
        async with exclusive(path.with_suffix(".lock")):
            self._cache.use(path)
            if await asyncio.to_thread(_is_whole, path, sha256, size):
                _open_to_models(path)
                return path
            await asyncio.to_thread(
                self._cache.make_room, size - _size(path) - _size(path.with_suffix(".part"))
            )
            url = f"{registry_url.rstrip('/')}/v1/artifacts/{sha256}"
            await _Download(url, token, path, size).run()
            await asyncio.to_thread(_remember, path)
        return path


class _Download:
    """The download of one artifact to ``path``, in several attempts.

    Each attempt appends to the file ``<sha256>.part``. So the next attempt loads only the missing bytes. This
    is true even if the next attempt is made by another worker. The registry may redirect the download to its
    artifact store with a signed URL. The replica's token is not sent to the store. If the store fails to send
    the artifact, the next attempt gets the bytes from the registry.
    """

    def __init__(self, url: str, token: str, path: Path, size: int) -> None:
        self._url = url
        self._token = token
        self._path = path
        self._part = path.with_suffix(".part")
        self._size = size
        self._redirects = True

    async def run(self) -> None:
        """Download the artifact, with retries.

        Raise NotFound immediately if the registry does not have the artifact. Raise Unavailable if the last
        attempt fails.
        """
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, TRIES + 1):
            try:
                await self._attempt()
                return
            except (httpx.HTTPError, Unavailable) as problem:
                if attempt == TRIES:
                    raise Unavailable(
                        f"The artifact {self._path.name[:12]} cannot be fetched: {_text(problem)}"
                    ) from None
                log.warning(
                    "the download of an artifact failed; the worker tries again",
                    extra={"artifact": self._path.name, "problem": _text(problem)},
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _attempt(self) -> None:
        """Download the missing bytes, check the digest of the whole file, and rename the file to ``path``."""
        digest, count = await asyncio.to_thread(self._written)
        sender = "this host"
        if count < self._size:
            async with self._opened(count) as (answer, sender):
                if not _continues(answer, count):
                    digest, count = hashlib.sha256(), 0
                with self._part.open("ab" if count else "wb") as output:
                    async for chunk in answer.aiter_bytes(CHUNK):
                        count += len(chunk)
                        if count > self._size:
                            break
                        digest.update(chunk)
                        output.write(chunk)
        if count < self._size:
            raise Unavailable(f"{sender} sent {count} of {self._size} bytes")
        if count > self._size or digest.hexdigest() != self._path.name:
            self._part.unlink()
            raise Unavailable(
                f"{sender} sent {count} bytes with sha256 {digest.hexdigest()[:12]}; expected {self._size} "
                f"bytes with sha256 {self._path.name[:12]}"
            )
        self._part.replace(self._path)

    def _written(self) -> tuple[Any, int]:
        """Return the hash of the bytes that earlier attempts have written, and the number of these bytes."""
        try:
            with self._part.open("rb") as written:
                digest = hashlib.file_digest(written, "sha256")
                return digest, written.tell()
        except FileNotFoundError:
            return hashlib.sha256(), 0

    @contextlib.asynccontextmanager
    async def _opened(self, start: int) -> AsyncIterator[tuple[httpx.Response, str]]:
        """Request the bytes from ``start`` to the end. Yield the response and the name of its sender."""
        from_start = {"Range": f"bytes={start}-"} if start else {}
        headers = from_start | {"Authorization": f"Bearer {self._token}"}
        query = {} if self._redirects else {"redirect": "false"}
        async with (
            _client(self._url) as client,
            client.stream("GET", self._url, headers=headers, params=query) as answer,
        ):
            if not answer.is_redirect:
                _check_status(answer, self._path.name)
                yield answer, "the registry"
                return
            target = str(answer.url.join(answer.headers["Location"]))
        # Disable redirects until the store answers. If it does not, the next attempt gets the artifact from
        # the registry itself.
        self._redirects = False
        async with _client(target) as client, client.stream("GET", target, headers=from_start) as answer:
            if answer.status_code not in (200, 206):
                raise Unavailable(f"the artifact store answered {answer.status_code}")
            self._redirects = True
            yield answer, "the artifact store"


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=TIMEOUT, trust_env=False, verify=trusted(url))


def _check_status(answer: httpx.Response, sha256: str) -> None:
    if answer.status_code == 404:
        raise NotFound(f"The registry has no artifact {sha256}.")
    if answer.status_code in (401, 403):
        # The autoscaler tells the registry which replicas run. A registry that has just started may not know
        # them yet, and then rejects their tokens. So the download is tried again.
        raise Unavailable("the registry does not know this replica's token", reason="unauthorized")
    if answer.status_code not in (200, 206):
        raise Unavailable(f"the registry answered {answer.status_code}")


def _continues(answer: httpx.Response, start: int) -> bool:
    """Return True if an answer begins at byte ``start``. The HTTP status alone does not show this."""
    told: str = answer.headers.get("Content-Range", "")
    return told.startswith(f"bytes {start}-")


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def _look(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ino]


def _open_to_models(path: Path) -> None:
    """Make a cached file readable for every user.

    The model repository has a hard link to this file, and a hard link shares the file's mode. The model's
    user must read it there. The cache's folder stays closed to this user.
    """
    if path.stat().st_mode & 0o777 != READ_ONLY:
        path.chmod(READ_ONLY)


def _remember(path: Path) -> None:
    path.chmod(READ_ONLY)
    path.with_suffix(".ok").write_text(json.dumps(_look(path)))


def _is_whole(path: Path, sha256: str, size: int) -> bool:
    try:
        look = _look(path)
    except FileNotFoundError:
        return False
    if look[0] != size:
        return False
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.with_suffix(".ok").read_text()) == look:
            return True
    with path.open("rb") as content:
        whole = hashlib.file_digest(content, "sha256").hexdigest() == sha256
    if whole:
        _remember(path)
    else:
        log.warning("a cached artifact is damaged; the worker downloads it again", extra={"artifact": sha256})
    return whole


def _text(problem: Exception) -> str:
    return str(problem) or type(problem).__name__
