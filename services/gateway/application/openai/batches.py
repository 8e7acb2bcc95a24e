"""The batches of OpenAI's API: Tidegate's batches with lines and results in OpenAI's form."""

from __future__ import annotations

import os
import time

from services.gateway.adapters.store.batches import BatchStore
from services.gateway.application.jobs.batches import BatchService
from services.gateway.application.openai.files import FileService
from services.gateway.domain.batches import Batch
from services.gateway.domain.openai.batches import BatchRequest, batch_name, check_cancel, no_batch
from services.gateway.domain.openai.facts import OpenAiFacts
from services.gateway.domain.openai.files import file_name
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.jobs import new_id


class OpenAiBatches:
    """Creates, finds, lists and cancels batches of OpenAI's API."""

    def __init__(self, store: BatchStore, batches: BatchService, files: FileService) -> None:
        self._store = store
        self._batches = batches
        self._files = files

    async def create(self, request: BatchRequest, principal: Principal) -> Batch:
        """Store a batch, and wake the loop that runs batches.

        Raises NotFound if the caller has no such file, BadRequest if the file is not for a batch.
        """
        file = await self._files.find(request.input_file, principal)
        if file.purpose != "batch":
            raise BadRequest(
                f"file {file_name(file.id)} has the purpose {file.purpose!r}: upload the requests with the "
                "purpose 'batch'"
            )
        now_ms = int(time.time() * 1e3)
        facts = OpenAiFacts(
            input_file=file.id,
            output_file=new_id(now_ms, os.urandom(10)),
            error_file=new_id(now_ms, os.urandom(10)),
            endpoint=request.endpoint,
            window=request.window,
            expires_ms=now_ms + request.window_s * 1000,
            metadata=request.metadata,
        )
        batch = Batch(
            id=new_id(now_ms, os.urandom(10)),
            state="running",
            principal=principal.id,
            lines=file.lines,
            created_ms=now_ms,
            endpoints=None if principal.endpoints is None else tuple(sorted(principal.endpoints)),
            openai=facts,
            weight=principal.weight,
            role=principal.role,
        )
        await self._store.create(batch, await self._files.chunks(file))
        self._batches.wake()
        return batch

    async def find(self, id_: bytes, principal: Principal) -> Batch:
        """Return a batch. Raises NotFound, unless ``principal`` is its owner or has the scope ``admin``."""
        batch = await self._store.get(id_)
        if batch is None or batch.openai is None or not principal.sees(batch.principal):
            raise no_batch(batch_name(id_))
        return batch

    async def latest(self, principal: str | None, after: bytes | None, limit: int) -> list[Batch]:
        """Return a page of batches, the newest first. ``after``: the last id of the previous page.

        ``principal``: the owner's id; None means all owners.
        """
        return await self._store.latest(principal, after, limit, openai=True)

    async def cancel(self, batch: Batch) -> Batch:
        """Cancel the unfinished lines of a batch. Raises BadRequest if the batch has ended."""
        if (problem := check_cancel(batch)) is not None:
            raise problem
        return await self._batches.cancel(batch)
