"""Overrides by operators: stored in the registry, or on this machine until the registry can be reached.

An override fixes the number of replicas of one Deployment.
"""

from __future__ import annotations

from collections.abc import Callable

from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.registry.client import RegistryClient
from services.autoscaler.domain.snapshot import LocalOverride
from tidegate.kernel import telemetry
from tidegate.kernel.errors import NotFound, TidegateError, Unavailable

log = telemetry.logger(__name__)

REGISTRY, HERE = "registry", "autoscaler"


class Overrides:
    """The overrides by operators.

    ``pending``: the overrides that the registry has not received yet. They have precedence over the
    registry's overrides.
    """

    def __init__(
        self, registry: RegistryClient, decision_store: DecisionStore, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._decision_store = decision_store
        self._clock = clock
        self.pending: dict[str, LocalOverride] = {}

    def take_over(self) -> None:
        """Read the overrides that the former leader could not send to the registry."""
        self.pending = self._decision_store.overrides()

    async def put(
        self, deployment: str, replicas: int, ttl_s: float | None, *, force: bool, known: bool
    ) -> str:
        """Set an override, and return where it is stored: ``REGISTRY`` or ``HERE``.

        If the registry does not answer, the override is stored on this machine (``HERE``). But if ``known``
        is False, the override is not stored, and ``NotFound`` is raised.

        ``known``: True if the last desired state contains the Deployment.
        """
        try:
            await self._registry.put_override(deployment, replicas, ttl_s, force=force)
        except Unavailable:
            expires = None if ttl_s is None else self._clock() + ttl_s
            self._keep(deployment, LocalOverride(replicas, expires, force), known)
            return HERE
        self._drop(deployment)
        return REGISTRY

    async def remove(self, deployment: str, *, known: bool) -> str:
        """Remove an override, and return where the removal is stored: ``REGISTRY`` or ``HERE``."""
        try:
            await self._registry.remove_override(deployment)
        except Unavailable:
            self._keep(deployment, LocalOverride(None, None), known)
            return HERE
        self._drop(deployment)
        return REGISTRY

    async def reconcile(self) -> None:
        """Send pending overrides to the registry. Log and drop overrides that it rejects."""
        for deployment, override in list(self.pending.items()):
            try:
                await self._send(deployment, override)
            except Unavailable:
                return
            except TidegateError as error:
                extra = {"deployment": deployment, "problem": error.message}
                log.warning("the registry rejected an override that was stored here", extra=extra)
            # An operator may have set another override meanwhile. The newer override stays pending.
            if self.pending.get(deployment) == override:
                self._drop(deployment)

    async def _send(self, deployment: str, override: LocalOverride) -> None:
        if override.replicas is None:
            await self._registry.remove_override(deployment)
            return
        left = None if override.expires_at is None else override.expires_at - self._clock()
        if left is None or left > 0:
            await self._registry.put_override(deployment, override.replicas, left, force=override.force)

    def _keep(self, deployment: str, override: LocalOverride, known: bool) -> None:
        if not known:
            raise NotFound(f"There is no Deployment {deployment} (as of the last read of the registry).")
        self._decision_store.save_override(deployment, override)
        self.pending[deployment] = override

    def _drop(self, deployment: str) -> None:
        if self.pending.pop(deployment, None) is not None:
            self._decision_store.drop_override(deployment)
