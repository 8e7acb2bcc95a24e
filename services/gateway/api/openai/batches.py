"""Serve OpenAI's batches. ``api/batches.py`` serves Tidegate's own batches at the same path."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from services.gateway.api.job_http import json_response, request_principal
from services.gateway.api.openai.files import in_openais_words, listed
from services.gateway.application.openai.batches import OpenAiBatches
from services.gateway.domain.batches import Batch
from services.gateway.domain.openai.batches import public, read_batch_id, read_batch_request
from tidegate.kernel.protocol.access import ADMIN


class OpenAiBatchHandlers:
    """The handlers for batches of OpenAI's API. The ids of these batches begin with ``batch_``."""

    def __init__(self, batches: OpenAiBatches) -> None:
        self._batches = batches
        self.create = in_openais_words(self._create)
        self.status = in_openais_words(self._status)
        self.cancel = in_openais_words(self._cancel)

    async def page(self, principal: str | None, after: str | None, limit: int) -> dict[str, Any]:
        """Return at most ``limit`` batches that are older than the batch ``after``, newest first.

        A caller with the scope admin gets the batches of ``principal``; None means the batches of all
        callers. Any other caller gets only its own batches. Raises NotFound if ``after`` is no id of a batch.
        """
        caller = request_principal()
        before = None if after is None else read_batch_id(after)
        owner = principal if caller.may(ADMIN) else caller.id
        found = await self._batches.latest(owner, before, limit + 1)
        return listed([_public(batch) for batch in found[:limit]], more=len(found) > limit)

    async def _create(self, document: dict[str, Any]) -> Response:
        return json_response(
            _public(await self._batches.create(read_batch_request(document), request_principal()))
        )

    async def _status(self, id: str) -> Response:
        return json_response(_public(await self._find(id)))

    async def _cancel(self, id: str) -> Response:
        return json_response(_public(await self._batches.cancel(await self._find(id))))

    async def _find(self, id: str) -> Batch:
        return await self._batches.find(read_batch_id(id), request_principal())


def _public(batch: Batch) -> dict[str, Any]:
    assert batch.openai is not None
    return public(batch, batch.openai)
