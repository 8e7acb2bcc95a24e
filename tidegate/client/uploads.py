"""Upload a file to the registry in parts, and continue after a lost connection.

The upload is a flow, so this module does no network I/O. The registry keeps the bytes that have arrived. So a
new process can continue an upload: if it sends the same file, the registry returns the unfinished upload.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import orjson

from tidegate.client.calls import Awaited, Blocking
from tidegate.client.core import Core
from tidegate.client.errors import BadAnswer, from_answer
from tidegate.client.flow import Answer, Flow, Send, Sleep
from tidegate.client.jobs import Document, document_of
from tidegate.kernel.errors import (
    BadRequest,
    Conflict,
    DeadlinePassed,
    NoRoutes,
    NotFound,
    TidegateError,
    Unavailable,
)

HASH_BYTES = 2**20
# The timeout of a request that sends a part, or that waits until the registry has checked the bytes.
REQUEST_S = 60.0
# After this many seconds without progress, an upload is given up. A registry restarts within seconds, so an
# upload survives a restart.
PATIENCE_S = 120.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
# The longest pause between two attempts while another process sends the same bytes.
LONGEST_TURN_S = 30.0
CHECK_PAUSE_S = 0.2

# A function that gets the number of stored bytes, and the text of a problem. The text is empty while the
# connection works.
Progress = Callable[[int, str], object]


def no_progress(offset: int, problem: str) -> None:
    """Ignore the progress."""


@dataclass(frozen=True, slots=True)
class Source:
    """An open file to upload."""

    file: BinaryIO
    sha256: str
    size: int

    @classmethod
    def of(cls, file: BinaryIO) -> Source:
        """Return a :class:`Source` for an open file. Read the whole file once, for its sha256."""
        digest, size = hashlib.sha256(), 0
        file.seek(0)
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            size += len(chunk)
        return cls(file, digest.hexdigest(), size)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on."""
        self.file.seek(offset)
        return self.file.read(size)


@dataclass(slots=True)
class Uploading:
    """One upload.

    ``prefix``: the URL path of the registry's API. It depends on the server that gets the requests: the
    gateway or the registry itself.
    """

    source: Source
    prefix: str
    progress: Progress = no_progress
    clock: Callable[[], float] = monotonic
    patience_s: float = field(default_factory=lambda: PATIENCE_S)
    _known: Document | None = field(default=None, init=False)

    def flow(self) -> Flow[Document]:
        """Send the bytes that the registry lacks, and wait until it has checked them. Return the upload.

        Retry after a lost connection, or if another process sends the same bytes. Raise the last error after
        ``patience_s`` seconds without progress. Raise BadRequest if the upload has failed, for example
        because the bytes that arrived do not have the announced sha256. Raise other errors of the registry
        immediately.
        """
        stored, pause, since = -1, FIRST_PAUSE_S, self.clock()
        while True:
            try:
                upload = yield from self._next()
            except (Unavailable, DeadlinePassed, NoRoutes) as lost:
                if self.clock() - since > self.patience_s:
                    raise
                self.progress(max(0, stored), lost.message)
                yield Sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            except Conflict:
                # Another process uploads the same bytes, and each process interrupts the other. So each waits
                # longer after each conflict, until one of them can send a part.
                if self.clock() - since > self.patience_s:
                    raise
                yield Sleep(pause)
                pause = min(2 * pause, LONGEST_TURN_S)
                continue
            if upload["state"] == "failed":
                raise BadRequest(str(upload["problem"]))
            if upload["offset"] != stored:
                stored, pause, since = int(upload["offset"]), FIRST_PAUSE_S, self.clock()
                self.progress(stored, "")
            if upload["state"] == "stored":
                return upload
            if upload["state"] == "verifying":
                yield Sleep(CHECK_PAUSE_S)

    def _next(self) -> Flow[Document]:
        """Open the upload, send its next part, or ask whether its bytes are checked.

        Return the upload's document.

        After an error, the next call opens the upload again.
        """
        upload, self._known = self._known, None
        if upload is None:
            upload = yield from self._open()
        elif upload["state"] == "verifying":
            upload = yield from self._send("GET", f"/{upload['id']}")
        else:
            upload = yield from self._append(upload)
        self._known = upload
        return upload

    def _open(self) -> Flow[Document]:
        body = orjson.dumps({"sha256": self.source.sha256, "size": self.source.size})
        return (yield from self._send("POST", "", body, {"Content-Type": "application/json"}))

    def _append(self, upload: Document) -> Flow[Document]:
        offset = upload["offset"]
        part = self.source.read(offset, upload["part_bytes"])
        headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
        try:
            later = yield from self._send("PATCH", f"/{upload['id']}", part, headers)
        except NotFound:  # the upload has expired, so open a new one
            return (yield from self._open())
        if later["offset"] == offset:
            raise BadAnswer(f"The registry stored none of the {len(part)} bytes sent at offset {offset}.")
        return later

    def _send(
        self, method: str, path: str, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> Flow[Document]:
        answer: Answer = yield Send(
            method, f"{self.prefix}/v1/uploads{path}", REQUEST_S, headers or {}, content
        )
        if answer.status >= 400:
            raise from_answer(answer.status, answer.headers, answer.body)
        return document_of(answer)


def with_remedy(error: TidegateError) -> TidegateError:
    """Add a sentence to an error's message: the same command can continue the upload. Return the error."""
    error.message = f"{error.message} The registry keeps what has arrived: run the same command again."
    error.args = (error.message,)
    return error


@dataclass(frozen=True, slots=True)
class UploadFlows:
    """The uploads of a client. They go through the gateway."""

    core: Core

    def upload(self, source: Source, progress: Progress | None) -> Flow[Document]:
        """Upload a file, and return the upload's document."""
        uploading = Uploading(source, "/api/registry", progress or no_progress, clock=self.core.caller.clock)
        return (yield from uploading.flow())


class UploadCalls(Blocking):
    """The blocking call that uploads a file. See `docs/stores.md`."""

    _uploads: UploadFlows

    def upload(self, path: str | Path, *, progress: Progress | None = None) -> Document:
        """Upload a model's file in parts, and return a document with its ``sha256`` and ``size``.

        After a lost connection, the upload continues. A new process that uploads the same file continues it,
        too. Bytes that the registry already has are not sent again. ``progress``: a function that gets the
        number of stored bytes, and the text of a problem. The text is empty while the connection works.
        """
        with Path(path).open("rb") as file:
            return self._run(self._uploads.upload(Source.of(file), progress))


class AsyncUploadCalls(Awaited):
    """The call of :class:`UploadCalls` for asyncio."""

    _uploads: UploadFlows

    async def upload(self, path: str | Path, *, progress: Progress | None = None) -> Document:
        """Upload a model's file in parts; see :meth:`UploadCalls.upload`."""
        with await asyncio.to_thread(Path(path).open, "rb") as file:
            source = await asyncio.to_thread(Source.of, file)
            return await self._run(self._uploads.upload(source, progress))
