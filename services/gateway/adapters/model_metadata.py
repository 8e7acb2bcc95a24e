"""Cache the metadata that workers publish about their models, so that requests rarely wait for the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from tidegate.kernel import tasks
from tidegate.kernel.protocol.presence import ModelMetadata
from tidegate.kernel.store import Store, StoreUnavailable

REFRESH_S = 5.0
MISSING_S = 0.5


class ModelMetadataCache:
    """A cache of the last known metadata of the Deployments whose names ``names()`` returns."""

    def __init__(self, store: Store, names: Callable[[], Sequence[str]]) -> None:
        self._store = store
        self._names = names
        self._metadata: dict[str, ModelMetadata] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start reading in the background."""
        self._task = asyncio.create_task(self._run(), name="model metadata")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    async def get(self, deployment: str) -> ModelMetadata | None:
        """Return a Deployment's metadata, or None if no worker has published it.

        If the metadata is not in the cache, read it from the store. Raise StoreUnavailable if the store does
        not answer.
        """
        if deployment not in self._metadata:
            self._metadata |= await self._store.models([deployment])
        return self._metadata.get(deployment)

    def labels(self, deployment: str) -> Mapping[str, Sequence[str]]:
        """Return a list of class names for each output; an empty mapping if no metadata is known."""
        metadata = self._metadata.get(deployment)
        return metadata.labels if metadata is not None else {}

    async def _run(self) -> None:
        while True:
            names = list(self._names())
            try:
                fresh = await self._store.models(names)
                # Keep metadata that the store has lost. It is still valid, because a version never changes.
                self._metadata = {
                    n: m for n in names if (m := fresh.get(n) or self._metadata.get(n)) is not None
                }
            except StoreUnavailable:
                pass
            await asyncio.sleep(REFRESH_S if len(self._metadata) == len(names) else MISSING_S)
