"""The client of the container engine. Only this module uses the engine's SDK."""

from __future__ import annotations

import asyncio
import io
import tarfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException

from tidegate.kernel.errors import Unavailable

T = TypeVar("T")
Doc = dict[str, Any]

TIMEOUT_S = 30.0
PULL_TIMEOUT_S = 3600.0
THREADS = 8


class EngineError(Unavailable):
    """The engine rejected a call. The error has the engine's message and the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """A container engine at ``url`` (``unix://`` or ``tcp://``). Every failure raises ``Unavailable``.

    The SDK blocks, so calls run in threads, each with its own connection. The proxy in front of the engine
    requires ``token``; the engine itself ignores it.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self._url = url
        self._token = token
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="engine")
        self._local = threading.local()

    def close(self) -> None:
        """Let the threads end after their current calls."""
        self._threads.shutdown(wait=False)

    async def containers(self, labels: Mapping[str, str]) -> list[Doc]:
        """Return the containers that have all these labels, including ended containers.

        An empty value of a label matches any value.
        """
        filters = {"label": [f"{key}={value}" if value else key for key, value in labels.items()]}
        found: list[Doc] = await self._do(lambda api: api.containers(all=True, filters=filters))
        return found

    async def info(self) -> Doc:
        """Return the engine's information about itself and its machine."""
        found: Doc = await self._do(lambda api: api.info())
        return found

    async def inspect(self, name: str) -> Doc:
        """Return all information about one container."""
        found: Doc = await self._do(lambda api: api.inspect_container(name))
        return found

    async def create(self, name: str, body: Doc) -> str:
        """Create a container and return its id. Raise ``EngineError`` (status 409) if the name is in use."""
        made: Doc = await self._do(lambda api: api.create_container_from_config(body, name))
        return str(made["Id"])

    async def put_files(self, name: str, folder: str, files: Mapping[str, bytes], uid: int) -> None:
        """Write files into a container and create their folders. All belong to the user ``uid``.

        Paths are relative to ``folder``.
        """
        archive = _archive(files, uid)
        await self._do(lambda api: api.put_archive(name, folder, archive))

    async def start(self, name: str) -> None:
        """Start a created container."""
        await self._do(lambda api: api.start(name))

    async def signal(self, name: str, signal: str) -> bool:
        """Send a signal to the container's first process. Return False if the container does not run."""
        try:
            await self._do(lambda api: api.kill(name, signal))
        except EngineError as error:
            if error.status in (404, 409):
                return False
            raise
        return True

    async def wait(self, name: str, timeout_s: float) -> int:
        """Wait until the container has ended, and return its exit code."""
        ended: Doc = await self._do(lambda api: api.wait(name, timeout=timeout_s))
        return int(ended["StatusCode"])

    async def output(self, name: str, lines: int) -> str:
        """Return the last lines of a container's output; empty if its log cannot be read."""
        try:
            raw: bytes = await self._do(lambda api: api.logs(name, tail=lines))
        except EngineError:
            return ""
        return raw.decode(errors="replace")

    async def remove(self, name: str) -> bool:
        """Kill and remove a container with its anonymous volumes. Return False if it does not exist."""
        try:
            await self._do(lambda api: api.remove_container(name, v=True, force=True))
        except EngineError as error:
            if error.status == 404:
                return False
            # Another call is already removing this container.
            if error.status == 409 and "already in progress" in error.message:
                return True
            raise
        return True

    async def image(self, reference: str) -> Doc | None:
        """Return the engine's image with this name; None if it has no such image."""
        try:
            found: Doc = await self._do(lambda api: api.inspect_image(reference))
        except EngineError as error:
            if error.status == 404:
                return None
            raise
        return found

    async def pull(self, reference: str) -> None:
        """Pull an image. If this fails, raise ``EngineError`` with the message of the image registry."""
        await self._do(lambda api: _pull(api, reference))

    async def _do(self, work: Callable[[docker.APIClient], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, work)

    def _call(self, work: Callable[[docker.APIClient], T]) -> T:
        try:
            api = getattr(self._local, "api", None)
            if api is None:
                api = self._local.api = _client(self._url, self._token)
            return work(api)
        except APIError as error:
            status = error.response.status_code if error.response is not None else 500
            raise EngineError(str(error.explanation or error).strip(), status) from error
        except (DockerException, requests.RequestException, OSError) as error:
            raise Unavailable(f"The container engine at {self._url} does not answer: {error}") from error


def _client(url: str, token: str) -> docker.APIClient:
    class Client(docker.APIClient):  # type: ignore[misc]
        # The client's constructor already calls the engine, and this call needs the Authorization header. So
        # the header cannot be set after the construction. This subclass adds it to every call.
        def send(self, request: Any, **how: Any) -> Any:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            return super().send(request, **how)

    return Client(url, version="auto", timeout=TIMEOUT_S)


def _pull(api: docker.APIClient, reference: str) -> None:
    repository, tag = docker.utils.parse_repository_tag(reference)
    api.timeout, before = PULL_TIMEOUT_S, api.timeout
    try:
        # Errors during the pull arrive as lines of the response.
        for line in api.pull(repository, tag or "latest", stream=True, decode=True):
            if "error" in line:
                raise EngineError(f"{reference} cannot be pulled: {line['error']}", 500)
    finally:
        api.timeout = before


def _archive(files: Mapping[str, bytes], uid: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder in sorted({path.rpartition("/")[0] for path in files} - {""}):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o700, uid, uid
            archive.addfile(entry)
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.uid, entry.gid = len(content), 0o400, uid, uid
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
