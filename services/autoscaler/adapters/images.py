"""The images of workers: what the engine has of them, and fetching them without holding up the loop."""

from __future__ import annotations

import asyncio

from services.autoscaler.adapters.container_spec import Pull
from services.autoscaler.adapters.engine import Doc, Engine
from services.autoscaler.domain.launcher import LaunchFailed
from tidegate import telemetry
from tidegate.errors import Unavailable

log = telemetry.logger(__name__)


class Images:
    """Images at one engine, fetched as ``pull`` says."""

    def __init__(self, engine: Engine, pull: Pull) -> None:
        self._engine = engine
        self._pull = pull
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def digest(self, reference: str) -> str:
        """The image's name with the digest of its registry, or its id where it comes from none.

        Raises ``LaunchFailed`` for one that is not there, which is being fetched then if it may be.
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
            await self._engine.pull(reference)
        found = await self._engine.image(reference)
        if found is not None:
            self._pulls.pop(reference, None)
            return found
        if self._pull == "never":
            raise LaunchFailed(f"The engine has no image {reference}, and fetching is switched off.")
        raise LaunchFailed(self._fetch(reference))

    def _fetch(self, reference: str) -> str:
        """Fetch in the background: it may take minutes, in which other replicas must be looked after."""
        pull = self._pulls.get(reference)
        if pull is not None and not pull.done():
            return f"The image {reference} is being fetched."
        failed = pull.exception() if pull is not None else None
        self._pulls[reference] = asyncio.create_task(self._engine.pull(reference), name=f"pull {reference}")
        self._pulls[reference].add_done_callback(_tell)
        if isinstance(failed, Unavailable):
            return f"The image {reference} is not there: {failed.message} It is tried again."
        return f"The image {reference} is being fetched."


def _tell(pull: asyncio.Task[None]) -> None:
    if not pull.cancelled() and (error := pull.exception()) is not None:
        log.warning("an image was not fetched", extra={"problem": str(error)})
