"""Test that pulling images never delays a launch for longer than a moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.autoscaler.adapters.docker import images as module
from services.autoscaler.adapters.docker.engine import EngineError
from services.autoscaler.adapters.docker.images import Images
from services.autoscaler.domain.launcher import LaunchFailed

pytestmark = pytest.mark.unit

# Longer than a whole test.
LONG_S = 30.0


class Registry:
    """An engine whose pulls end when ``open`` is set. Each pull brings a newer image."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.pulls = self.version = 0
        self.refuses = ""

    async def pull(self, reference: str) -> None:
        self.pulls += 1
        await self.open.wait()
        if self.refuses:
            raise EngineError(self.refuses, 500)
        self.version += 1

    async def image(self, reference: str) -> dict[str, Any] | None:
        return {"Id": f"sha256:{self.version}"}


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def images(registry: Any) -> Images:
    return Images(registry, "always")


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(module, "MOMENT_S", 0.0)


async def being_fetched(images: Images) -> None:
    async with asyncio.timeout(LONG_S):
        with pytest.raises(LaunchFailed, match="image ours/worker is being pulled"):
            await images.digest("ours/worker")


async def fetched(registry: Registry) -> None:
    """The running pull ends. A pull that starts later does not."""
    registry.open.set()
    for _ in range(5):
        await asyncio.sleep(0)
    registry.open.clear()


async def test_a_slow_pull_holds_up_no_launch(images, registry, no_patience):
    for _ in range(3):
        await being_fetched(images)
    await fetched(registry)
    assert await images.digest("ours/worker") == "sha256:1"
    assert registry.pulls == 1, "the finished pull is the one of this launch"
    await being_fetched(images)
    assert registry.pulls == 2, "the next launch pulls again"


async def test_a_quick_pull_fails_no_launch(images, registry, monkeypatch):
    monkeypatch.setattr(module, "MOMENT_S", LONG_S)
    registry.open.set()
    assert [await images.digest("ours/worker") for _ in range(2)] == ["sha256:1", "sha256:2"]


async def test_launches_at_one_time_share_a_pull(images, registry, monkeypatch):
    monkeypatch.setattr(module, "MOMENT_S", LONG_S)
    launches = asyncio.gather(*(images.digest("ours/worker") for _ in range(3)))
    await asyncio.sleep(0)
    await fetched(registry)
    assert await launches == ["sha256:1"] * 3
    assert registry.pulls == 1


async def test_a_pull_that_fails_is_told_and_tried_again(images, registry, no_patience):
    registry.refuses = "no such host."
    await being_fetched(images)
    await fetched(registry)
    with pytest.raises(
        LaunchFailed,
        match=r"could not be pulled\. The next launch of a replica tries again\. Reason: no such host",
    ):
        await images.digest("ours/worker")
    registry.refuses = ""
    await being_fetched(images)
    await fetched(registry)
    assert await images.digest("ours/worker") == "sha256:1"


async def test_what_was_fetched_long_ago_is_not_the_newest(images, registry, no_patience, monkeypatch):
    await being_fetched(images)
    await fetched(registry)
    monkeypatch.setattr(module, "OLD_S", 0.0)
    await being_fetched(images)
    assert registry.pulls == 2
