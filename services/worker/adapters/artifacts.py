"""Cache artifacts on this host by sha256, so that replicas can start while the registry is down."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from pathlib import Path

import httpx

from services.worker.adapters.file_lock import exclusive
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
    """A cache of artifacts in ``folder``, shared by the workers of one host.

    The file ``<sha256>`` is an artifact. The file ``<sha256>.ok`` has the size, modification time and inode
    that it had when its digest was last checked. The digest is checked again only if one of these changed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    async def fetch(self, registry_url: str, token: str, sha256: str, size: int) -> Path:
        """Return the artifact as a local file. Download it if the cache has no complete copy.

        Raises NotFound if the registry does not have it. Raises Unavailable if it must be downloaded and the
        registry cannot be reached or sends wrong bytes.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / sha256
        async with exclusive(path.with_suffix(".lock")):
            if await asyncio.to_thread(_is_whole, path, sha256, size):
                _open_to_models(path)
                return path
            await self._download(f"{registry_url.rstrip('/')}/v1/artifacts/{sha256}", token, path, size)
            await asyncio.to_thread(_remember, path)
        return path

    async def _download(self, url: str, token: str, path: Path, size: int) -> None:
        pause_s = FIRST_PAUSE_S
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(
            timeout=TIMEOUT, headers=headers, trust_env=False, verify=trusted(url)
        ) as client:
            for attempt in range(1, TRIES + 1):
                try:
                    await _stream(client, url, path, size)
                    return
                except (httpx.HTTPError, Unavailable) as problem:
                    if attempt == TRIES:
                        raise Unavailable(
                            f"The artifact {path.name[:12]} cannot be fetched: {_text(problem)}"
                        ) from None
                    log.warning(
                        "the download of an artifact failed; it is tried again",
                        extra={"artifact": path.name, "problem": _text(problem)},
                    )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _stream(client: httpx.AsyncClient, url: str, path: Path, size: int) -> None:
    """Download to a temporary file, check it, and then rename it to ``path``."""
    part = path.with_suffix(f".{os.getpid()}.part")
    digest, count = hashlib.sha256(), 0
    try:
        async with client.stream("GET", url) as answer:
            _check_status(answer, path.name)
            with part.open("wb") as output:
                async for chunk in answer.aiter_bytes(CHUNK):
                    count += len(chunk)
                    if count > size:
                        raise Unavailable(f"the registry sent more than the registered {size} bytes")
                    digest.update(chunk)
                    output.write(chunk)
        if count != size or digest.hexdigest() != path.name:
            raise Unavailable(
                f"the registry sent {count} bytes with sha256 {digest.hexdigest()[:12]}, expected {size} "
                f"with {path.name[:12]}"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_status(answer: httpx.Response, sha256: str) -> None:
    if answer.status_code == 404:
        raise NotFound(f"The registry has no artifact {sha256}.")
    if answer.status_code in (401, 403):
        # A registry that has just started learns from the autoscaler which replicas run. Until then it
        # refuses their tokens.
        raise Unavailable("the registry does not know this replica's token", reason="unauthorized")
    if answer.status_code != 200:
        raise Unavailable(f"the registry answered {answer.status_code}")


def _look(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ino]


def _open_to_models(path: Path) -> None:
    """Make a cached file readable for every user, because hard links in model repositories share its mode.

    The cache's folder stays closed to the user that the model runs as.
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
        log.warning("a cached artifact is damaged; it is downloaded again", extra={"artifact": sha256})
    return whole


def _text(problem: Exception) -> str:
    return str(problem) or type(problem).__name__
