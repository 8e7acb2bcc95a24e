"""The images of workers: what the engine has of them, and fetching them without holding up the loop."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from services.autoscaler.adapters.docker.container_spec import Pull
from services.autoscaler.adapters.docker.engine import PULL_TIMEOUT_S, Doc, Engine
from services.autoscaler.domain.launcher import LaunchFailed
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

# An image that has not changed at its registry is fetched within this: no launch has to fail for it.
MOMENT_S = 1.0
# What was fetched for a launch that never came is not the newest after so long.
OLD_S = PULL_TIMEOUT_S


class Fetch(NamedTuple):
    """An image on its way, or fetched and not used yet. ``began`` is on the monotonic clock, in seconds."""

    pull: asyncio.Task[None]
    began: float


class Images:
    """Images at one engine, fetched as ``pull`` says."""

    def __init__(self, engine: Engine, pull: Pull) -> None:
        self._engine = engine
        self._pull = pull
        self._fetches: dict[str, Fetch] = {}

    async def digest(self, reference: str) -> str:
        """The image's name with the digest of its registry, or its id where it comes from none.

        Raises ``LaunchFailed`` for one that is not there, or not the newest where that is wanted; it is
        being fetched then if it may be.
        """
        found = await self._found(reference)
        digests = found.get("RepoDigests") or []
        return str(digests[0] if digests else found["Id"])

    async def uid(self, reference: str) -> int:
        """The number of the user that the image runs as; 0 where it names none by number."""
        found = await self._engine.image(reference)
        user = str(((found or {}).get("Config") or {}).get("User") or "").partition(":")[0]
        return int(user) if user.isdecimal() else 0

    async def _found(self, reference: str) -> Doc:
        if self._pull == "always":
            await self._renew(reference)
        found = await self._engine.image(reference)
        if found is not None:
            if self._pull == "missing":
                self._fetches.pop(reference, None)
            return found
        if self._pull == "never":
            raise LaunchFailed(f"The engine has no image {reference}, and fetching is switched off.")
        raise LaunchFailed(self._fetch(reference))

    async def _renew(self, reference: str) -> None:
        """Fetch it for this launch, in the background if that takes longer than a moment.

        Raises ``LaunchFailed`` while it is fetched, and when it was not. What was fetched in the background
        counts for the next launch.
        """
        fetch, now = self._fetches.get(reference), time.monotonic()
        if fetch is None or (fetch.pull.done() and now - fetch.began > OLD_S):
            fetch = self._begin(reference)
        # Those that have waited for their moment already hold up nobody again.
        await asyncio.wait({fetch.pull}, timeout=max(0.0, fetch.began + MOMENT_S - now))
        if not fetch.pull.done():
            raise LaunchFailed(f"The image {reference} is being fetched.")
        if self._fetches.get(reference) is fetch:
            del self._fetches[reference]
        if (failed := fetch.pull.exception()) is not None:
            why = failed.message if isinstance(failed, Unavailable) else repr(failed)
            raise LaunchFailed(f"The image {reference} was not fetched: {why} It is tried again.")

    def _fetch(self, reference: str) -> str:
        """Fetch in the background: it may take minutes, in which other replicas must be looked after."""
        fetch = self._fetches.get(reference)
        if fetch is not None and not fetch.pull.done():
            return f"The image {reference} is being fetched."
        failed = fetch.pull.exception() if fetch is not None else None
        self._begin(reference)
        if isinstance(failed, Unavailable):
            return f"The image {reference} is not there: {failed.message} It is tried again."
        return f"The image {reference} is being fetched."

    def _begin(self, reference: str) -> Fetch:
        pull = asyncio.create_task(self._engine.pull(reference), name=f"pull {reference}")
        pull.add_done_callback(_tell)
        fetch = self._fetches[reference] = Fetch(pull, time.monotonic())
        return fetch


def _tell(pull: asyncio.Task[None]) -> None:
    if not pull.cancelled() and (error := pull.exception()) is not None:
        log.warning("an image was not fetched", extra={"problem": str(error)})
