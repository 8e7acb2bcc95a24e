"""Find and pull images of workers. Pulls run in the background, so that the control loop does not wait."""

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

# A launch waits at most this many seconds for the pull of its image. If the image has not changed, the pull
# usually ends in this time.
MOMENT_S = 1.0
# A launch can use the result of an earlier pull that began at most this many seconds ago.
OLD_S = PULL_TIMEOUT_S


class ImagePull(NamedTuple):
    """A pull that still runs, or that has ended with a result that no launch has used yet.

    ``began``: the monotonic time of its start, in seconds.
    """

    pull: asyncio.Task[None]
    began: float


class Images:
    """The images of one engine. ``pull`` says when to pull an image: never, always, or if it is missing."""

    def __init__(self, engine: Engine, pull: Pull) -> None:
        self._engine = engine
        self._pull = pull
        self._pulls: dict[str, ImagePull] = {}

    async def digest(self, reference: str) -> str:
        """Return the image's name with its registry digest, or the image's id if it has no digest.

        If the class's ``pull`` is "always", first pull the newest image. Raise ``LaunchFailed`` if this pull
        fails, or if it is not finished ``MOMENT_S`` seconds after its start.

        If the engine does not have the image, raise ``LaunchFailed``. Unless ``pull`` is "never", also start
        a pull in the background.
        """
        found = await self._found(reference)
        digests = found.get("RepoDigests") or []
        return str(digests[0] if digests else found["Id"])

    async def uid(self, reference: str) -> int:
        """Return the user id that the image runs as; 0 if it has no numeric user."""
        found = await self._engine.image(reference)
        user = str(((found or {}).get("Config") or {}).get("User") or "").partition(":")[0]
        return int(user) if user.isdecimal() else 0

    async def _found(self, reference: str) -> Doc:
        if self._pull == "always":
            await self._renew(reference)
        found = await self._engine.image(reference)
        if found is not None:
            if self._pull == "missing":
                self._pulls.pop(reference, None)
            return found
        if self._pull == "never":
            raise LaunchFailed(f"The engine has no image {reference}, and TIDEGATE_DOCKER_PULL is `never`.")
        raise LaunchFailed(self._pull_missing(reference))

    async def _renew(self, reference: str) -> None:
        """Pull the image for this launch, and wait at most ``MOMENT_S`` seconds.

        Raise ``LaunchFailed`` if the pull failed or is not finished yet. An unfinished pull continues in the
        background, and the next launch uses its result.
        """
        running, now = self._pulls.get(reference), time.monotonic()
        if running is None or (running.pull.done() and now - running.began > OLD_S):
            running = self._begin(reference)
        await asyncio.wait({running.pull}, timeout=max(0.0, running.began + MOMENT_S - now))
        if not running.pull.done():
            raise LaunchFailed(f"The image {reference} is being pulled.")
        if self._pulls.get(reference) is running:
            del self._pulls[reference]
        if (failed := running.pull.exception()) is not None:
            reason = failed.message if isinstance(failed, Unavailable) else repr(failed)
            raise LaunchFailed(
                f"The image {reference} could not be pulled. "
                f"The next launch of a replica tries again. Reason: {reason}"
            )

    def _pull_missing(self, reference: str) -> str:
        """Start a pull in the background, unless one is running. Return why the launch fails now."""
        running = self._pulls.get(reference)
        if running is not None and not running.pull.done():
            return f"The image {reference} is being pulled."
        failed = running.pull.exception() if running is not None else None
        self._begin(reference)
        if isinstance(failed, Unavailable):
            return f"The image {reference} is missing: {failed.message} The autoscaler pulls the image again."
        return f"The image {reference} is being pulled."

    def _begin(self, reference: str) -> ImagePull:
        pull = asyncio.create_task(self._engine.pull(reference), name=f"pull {reference}")
        pull.add_done_callback(_log_failure)
        running = self._pulls[reference] = ImagePull(pull, time.monotonic())
        return running


def _log_failure(pull: asyncio.Task[None]) -> None:
    if not pull.cancelled() and (error := pull.exception()) is not None:
        log.warning("an image could not be pulled", extra={"problem": str(error)})
