"""The last desired state from the registry, with a copy on disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from services.autoscaler.adapters.registry.client import RegistryClient
from services.autoscaler.domain.desired_state import acceptable
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.models import Deployment, DesiredState

log = telemetry.logger(__name__)


class DesiredStateSource:
    """The last desired state that was read from the registry, with a copy on disk for the next start.

    If a read fails, the last desired state stays in use. ``answered``: True if the last read succeeded.
    """

    def __init__(self, registry: RegistryClient, cache: Path, on_change: Callable[[], None]) -> None:
        self.registry = registry
        self._cache = cache
        self._on_change = on_change
        self._again = asyncio.Event()
        self.current: DesiredState | None = None
        self.problem: str | None = "The registry has not been read yet."
        self.answered = False

    @property
    def deployments(self) -> list[Deployment]:
        """The Deployments of the last desired state."""
        return self.current.deployments if self.current is not None else []

    def load_cache(self) -> None:
        """Read the copy that an earlier run stored, if there is one."""
        try:
            self.current = DesiredState.model_validate_json(self._cache.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("the stored desired state cannot be read", extra={"problem": str(error)})

    def refresh_soon(self) -> None:
        """Let :meth:`run` read the registry immediately, because the desired state has changed."""
        self._again.set()

    async def run(self, every_s: float) -> None:
        """Read the registry until cancelled: every ``every_s`` seconds, and after :meth:`refresh_soon`."""
        while True:
            self._again.clear()
            await self.refresh()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), every_s)

    async def refresh(self) -> None:
        """Read the registry once. Record the problem if it does not answer."""
        try:
            fresh = await self.registry.desired_state()
        except TidegateError as error:
            self._fail(error.message)
            return
        self.answered = True
        if not acceptable(self.current, fresh):
            self._fail(
                "The registry lost Deployments: its revision is lower than before. The autoscaler keeps the "
                "last desired state."
            )
            return
        if self.problem is not None:
            log.info("the registry answers", extra={"revision": fresh.revision})
        self.problem = None
        if fresh != self.current:
            self.current = fresh
            await asyncio.to_thread(self._keep, fresh)
            self._on_change()

    def _fail(self, problem: str) -> None:
        self.answered = False
        if problem != self.problem:
            log.warning("the registry could not be read", extra={"problem": problem})
        self.problem = problem

    def _keep(self, desired_state: DesiredState) -> None:
        temporary = self._cache.with_suffix(".new")
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(desired_state.model_dump_json())
            temporary.chmod(0o600)  # a Deployment's environment may hold secrets
            temporary.replace(self._cache)
        except OSError as error:
            log.warning("the desired state cannot be stored", extra={"problem": str(error)})
