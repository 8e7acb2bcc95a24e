"""What workers tell of their models, kept in memory: a request never waits for the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from tidegate.kernel import tasks
from tidegate.kernel.protocol.presence import ModelCard
from tidegate.kernel.store import Store, StoreUnavailable

REFRESH_S = 5.0
MISSING_S = 0.5


class ModelMetadataCache:
    """The last known card of each Deployment in ``names()``."""

    def __init__(self, store: Store, names: Callable[[], Sequence[str]]) -> None:
        self._store = store
        self._names = names
        self._cards: dict[str, ModelCard] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on reading in the background."""
        self._task = asyncio.create_task(self._run(), name="cards")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    async def card(self, deployment: str) -> ModelCard | None:
        """A Deployment's card; the store is asked only while none is known. Raises StoreUnavailable."""
        if deployment not in self._cards:
            self._cards |= await self._store.models([deployment])
        return self._cards.get(deployment)

    def labels(self, deployment: str) -> Mapping[str, Sequence[str]]:
        """The names of the classes of its outputs, as far as they are known."""
        card = self._cards.get(deployment)
        return card.labels if card is not None else {}

    async def _run(self) -> None:
        while True:
            names = list(self._names())
            try:
                found = await self._store.models(names)
                # What the store has forgotten is still true: a version's model does not change.
                self._cards = {n: c for n in names if (c := found.get(n) or self._cards.get(n)) is not None}
            except StoreUnavailable:
                pass
            await asyncio.sleep(REFRESH_S if len(self._cards) == len(names) else MISSING_S)
