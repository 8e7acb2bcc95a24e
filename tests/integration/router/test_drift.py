"""The judge of drift on a real store: pieces become windows, and a crash loses at most one of them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from services.router.adapters.drift_files import DriftFiles
from services.router.adapters.quality_file import QualityFile
from services.router.adapters.registry_cache import RegistryCache
from services.router.application import drift_judge
from services.router.application.drift_judge import DriftJudge
from services.router.application.quality_judge import QualityJudge
from services.router.domain.drift import DriftPolicy
from services.router.domain.drift_history import WindowLimits
from services.router.domain.quality_history import QualityLimits
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.profiles.bins import summarize
from tidegate.kernel.profiles.columns import Columns
from tidegate.kernel.profiles.piece import ProfilePiece, PublishedBins
from tidegate.kernel.store import Store
from tidegate.kernel.store.feedback import FeedbackStore
from tidegate.kernel.store.profiles import ProfileStore

pytestmark = pytest.mark.integration

ROWS = 3000


@pytest.fixture
async def judging(
    registry: Any, store: Store, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], DriftJudge]]:
    """Return a function that starts a judge on one state folder. Its loop is ended, as by a crash."""
    monkeypatch.setattr(drift_judge, "TICK_S", 0.02)
    async with AsyncExitStack() as stack:
        cache = RegistryCache(registry.url, "token", tmp_path / "intention.json")
        stack.push_async_callback(cache.close)
        await cache.refresh()

        def started() -> DriftJudge:
            quality = QualityJudge(
                FeedbackStore(store._redis), cache, QualityFile(tmp_path), lambda: True, QualityLimits()
            )
            found = DriftJudge(
                ProfileStore(store._redis),
                cache,
                DriftFiles(tmp_path / "drift"),
                lambda: True,
                WindowLimits(ROWS),
                DriftPolicy(),
                quality,
                Blobs(str(tmp_path / "blobs")),
            )
            found.start()
            stack.push_async_callback(found._loop.stop)
            return found

        yield started


class Replica:
    """A replica that samples rows of two normal features."""

    def __init__(self, store: ProfileStore, deployment: str) -> None:
        self._store, self._deployment = store, deployment
        self._random = np.random.default_rng(1)

    async def learn(self) -> None:
        """Push the summaries of rows, because there are no bins yet."""
        summaries = {name: summarize(values) for name, values in self._columns(ROWS, 0.0).numbers.items()}
        await self._push(ProfilePiece("r", time.time(), time.time(), summaries=summaries, learned_rows=ROWS))

    async def window(self, rows: int = ROWS, shift: float = 0.0) -> None:
        """Count rows in the published bins, and push the counts."""
        raw = await self._store.bins(self._deployment)
        assert raw is not None
        published = PublishedBins.from_bytes(raw)
        piece = ProfilePiece("r", time.time(), time.time(), published.id)
        piece.profile.count(self._columns(rows, shift), published.bins)
        await self._push(piece)

    def _columns(self, rows: int, shift: float) -> Columns:
        table = self._random.standard_normal((rows, 2))
        return Columns(rows, {"a": table[:, 0] + shift, "b": table[:, 1]})

    async def _push(self, piece: ProfilePiece) -> None:
        await self._store.push(self._deployment, piece.to_bytes())


async def test_a_crash_loses_at_most_the_open_window(
    registry: Any, store: Store, judging: Any, until: Any
) -> None:
    deployment, profiles = f"{registry.name}-v1", ProfileStore(store._redis)
    replica, judge = Replica(profiles, deployment), judging()

    def version() -> dict[str, Any]:
        found: dict[str, Any] = judge.shown(deployment)["items"][0]
        return found

    async def bins() -> bytes | None:
        return await profiles.bins(deployment)

    await replica.learn()
    await until(bins, "the bins are published")
    await replica.window()
    await until(lambda: version()["baseline"], "the baseline is frozen")
    await replica.window()
    await until(lambda: len(version()["points"]) == 1, "a window is judged")
    await replica.window(rows=100)
    await until(lambda: version()["open_rows"] == 100, "a window is open")

    await judge._loop.stop()
    judge = judging()
    assert (len(version()["points"]), version()["open_rows"]) == (1, 0)
    assert version()["baseline"] == {"source": "first_rows", "rows": ROWS}
    for _ in range(2):
        await replica.window(shift=0.5)
        points = len(version()["points"])
        await until(lambda seen=points: len(version()["points"]) > seen, "a window is judged")
    assert version()["drifted"] == ["a"]
    lines = {each["version"]: each for each in judge.snapshot()["items"]}
    assert lines[1]["endpoints"] == [registry.name]
    assert lines[2]["state"] == "learning"
