"""The registry over HTTP: the intention, with the last good one on disk, and overrides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from services.autoscaler.domain.desired_state import acceptable
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BY_REASON, BadRequest, TidegateError, Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.protocol.models import Deployment, DesiredState
from tidegate.kernel.service import caller

log = telemetry.logger(__name__)

TIMEOUT_S = 5.0


class RegistryClient:
    """The calls that the autoscaler makes; ``Unavailable`` when the registry does not answer."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=trusted(url)
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def desired_state(self) -> DesiredState:
        """Everything that is wanted."""
        raw = await self._call("GET", "/v1/intention")
        try:
            return DesiredState.model_validate_json(raw)
        except ValueError as error:
            raise Unavailable(f"The registry's intention cannot be read: {error}") from error

    async def put_override(
        self, deployment: str, replicas: int, ttl_s: float | None, *, force: bool = False
    ) -> None:
        """Set the override of a Deployment; ``ttl_s`` None: until lifted. ``force``: above its maximum."""
        body: dict[str, Any] = {"replicas": replicas}
        if force:
            body["force"] = True
        if ttl_s is not None:
            body["ttl_s"] = ttl_s
        await self._call("PUT", f"{_path(deployment)}/override", body)

    async def lift_override(self, deployment: str) -> None:
        """Remove the override of a Deployment."""
        await self._call("DELETE", f"{_path(deployment)}/override")

    async def put_replicas(self, artifacts: dict[str, str]) -> None:
        """Say which replicas run, and the sha256 of the artifact that each may read."""
        await self._call("PUT", "/v1/replicas", {"artifacts": artifacts})

    async def patch_policy(self, deployment: str, changes: dict[str, Any]) -> Deployment:
        """Change how a Deployment scales; return what it is then."""
        raw = await self._call("PATCH", f"{_path(deployment)}/policy", changes)
        return Deployment.model_validate_json(raw)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            answer = await self._http.request(method, path, json=body, headers=caller.onward())
        except httpx.HTTPError as error:
            raise Unavailable(f"The registry does not answer: {error or type(error).__name__}.") from error
        if answer.status_code >= 400:
            raise _error(answer)
        return answer.content


def _path(deployment: str) -> str:
    # The name is a caller's: it must stay one step of the path.
    return f"/v1/deployments/{quote(deployment, safe='')}"


def _error(answer: httpx.Response) -> TidegateError:
    try:
        said = answer.json()
        message, reason = str(said["error"]), str(said["reason"])
    except (ValueError, KeyError, TypeError):
        message, reason = answer.text[:200], ""
    if answer.status_code >= 500:
        return Unavailable(f"The registry failed: {message}")
    return BY_REASON.get(reason, BadRequest)(message)


class DesiredStateSource:
    """The last good intention. A failed read changes nothing; the file lets a restart do without."""

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
        """The Deployments of the last good intention."""
        return self.current.deployments if self.current is not None else []

    def load_cache(self) -> None:
        """Start with the last good intention of an earlier run, if there is one."""
        try:
            self.current = DesiredState.model_validate_json(self._cache.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("the kept intention cannot be read", extra={"problem": str(error)})

    def refresh_soon(self) -> None:
        """Read the registry at once: something changed there."""
        self._again.set()

    async def run(self, every_s: float) -> None:
        """Read the registry for ever, every ``every_s`` and whenever asked to."""
        while True:
            self._again.clear()
            await self.refresh()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), every_s)

    async def refresh(self) -> None:
        """Read the registry once; never raises for a registry that is away."""
        try:
            fresh = await self.registry.desired_state()
        except TidegateError as error:
            self._fail(error.message)
            return
        self.answered = True
        if not acceptable(self.current, fresh):
            self._fail(
                "The registry has lost its Deployments (its revision went back); keeping the last good."
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
            log.warning("the registry was not read", extra={"problem": problem})
        self.problem = problem

    def _keep(self, desired_state: DesiredState) -> None:
        temporary = self._cache.with_suffix(".new")
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(desired_state.model_dump_json())
            temporary.chmod(0o600)  # a Deployment's environment may hold secrets
            temporary.replace(self._cache)
        except OSError as error:
            log.warning("the intention cannot be kept", extra={"problem": str(error)})
