"""Write a model's metadata and request counts to the store. The gateways read them there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from services.worker.adapters import triton_facts
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain.statistics import RequestCounts, since
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.presence import ModelMetadata
from tidegate.kernel.protocol.statistics import EXECUTIONS
from tidegate.kernel.store import Store, StoreUnavailable

COUNT_EVERY_S = 1.0
CARD_EVERY_S = 10.0


class ModelReport:
    """Report one model to the gateways, through the store. If the store fails, counts are written later."""

    def __init__(self, store: Store, deployment: str) -> None:
        self._store = store
        self._deployment = deployment
        self._client: TritonClient | None = None
        self._model = ""
        self._metadata: ModelMetadata | None = None
        self._metadata_at = float("-inf")
        self._seen: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.tally = RequestCounts()

    async def use(self, client: TritonClient, model: str, folder: Path) -> None:
        """Report this model from now on. It must be loaded and warm. ``folder`` has its files."""
        config = triton_facts.as_json(await client.config(model))
        self._metadata = ModelMetadata(config, triton_facts.labels(config, folder))
        self._metadata_at = float("-inf")
        self._client, self._model = client, model
        self._seen = triton_facts.counts(await client.statistics(model))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="model report")

    def rest(self) -> None:
        """Stop reading counts until :meth:`use` is called again. Call this when Triton has ended."""
        self._client = None

    async def stop(self) -> None:
        """Write the last counts and stop."""
        await tasks.end(self._task)
        await self._write()

    async def _run(self) -> None:
        while True:
            await self._write()
            await asyncio.sleep(COUNT_EVERY_S)

    async def _write(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            if self._metadata is not None and time.monotonic() - self._metadata_at > CARD_EVERY_S:
                await self._store.publish_model(self._deployment, self._metadata)
                self._metadata_at = time.monotonic()
        found = self.tally.take(await self._triton())
        if not found:
            return
        try:
            ran_ms = int(time.time() * 1e3) if found.get(EXECUTIONS) else 0
            await self._store.add_statistics(self._deployment, found, ran_ms)
        except StoreUnavailable:
            self.tally.put_back(found)

    async def _triton(self) -> dict[str, int]:
        """Return the growth of Triton's counts since the last reading; empty if Triton does not answer."""
        if self._client is None:
            return {}
        try:
            now = triton_facts.counts(await self._client.statistics(self._model))
        except TidegateError:
            return {}
        found, self._seen = since(self._seen, now), now
        return found
