"""Read the desired state from the registry. Report decisions and moved traffic to the registry."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import httpx
import orjson
from pydantic import ValidationError

from services.router.adapters import shared_file
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.profiles.baseline import Baseline
from tidegate.kernel.protocol.models import DesiredState, Endpoint, RolloutPhase
from tidegate.kernel.protocol.reserves import with_reserves

log = telemetry.logger(__name__)


class RegistryCache:
    """The last desired state that was read from the registry.

    A copy on disk lets the router start while the registry is down.
    """

    def __init__(self, url: str, token: str, disk: Path) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=5.0,
            verify=trusted(url, trust_env=True),
        )
        self._disk = disk
        self._etag = ""  # of the desired state that was read last; empty if it came from the disk
        self.desired: DesiredState | None = None
        self.problem: str | None = "The registry has not been read yet."

    def load(self) -> None:
        """Load the copy on disk, if it exists."""
        with contextlib.suppress(OSError, ValidationError):
            self.desired = with_reserves(DesiredState.model_validate_json(self._disk.read_bytes()))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def refresh(self) -> None:
        """Read the desired state. On an error, keep the state that was read last, and set ``problem``."""
        try:
            known = {"If-None-Match": self._etag} if self._etag else {}
            # Use the older name of /v1/desired-state, because the registry may be older than the router.
            response = await self._client.get("/v1/intention", headers=known)
            if response.status_code == 304:
                self.problem = None
                return
            response.raise_for_status()
            desired = with_reserves(DesiredState.model_validate_json(response.content))
        except (httpx.HTTPError, ValidationError) as error:
            self.problem = f"The registry does not answer: {error or type(error).__name__}"
            return
        self.problem = None
        if self.desired is None or desired.revision != self.desired.revision:
            shared_file.replace(self._disk, response.content)
        self.desired, self._etag = desired, response.headers.get("ETag", "")

    async def baseline(self, model: str, version: int) -> Baseline | None:
        """Return a version's training baseline; None if the version has no baseline.

        Raise Unavailable if the registry cannot be read.
        """
        try:
            response = await self._client.get(f"/v1/models/{model}/versions/{version}/baseline")
            if response.status_code == 404:
                return None
            response.raise_for_status()
            return Baseline.from_json(orjson.loads(response.content))
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable(f"the training baseline of {model} {version} was not read: {error}") from None

    async def changes_after(self, id_: int, limit: int) -> list[dict[str, Any]]:
        """Return at most ``limit`` entries of the audit log with a larger id, oldest first.

        Raise Unavailable if the registry cannot be read.
        """
        # An older registry ignores `after`, and returns the newest entries first.
        items = await self._audit({"after": id_, "limit": limit})
        return sorted((each for each in items if each["id"] > id_), key=lambda each: int(each["id"]))

    async def newest_change(self) -> int:
        """Return the id of the newest entry of the audit log; 0 if it is empty.

        Raise Unavailable if the registry cannot be read.
        """
        return next((int(each["id"]) for each in await self._audit({"limit": 1})), 0)

    async def _audit(self, query: dict[str, int]) -> list[dict[str, Any]]:
        try:
            response = await self._client.get("/v1/audit", params=query)
            response.raise_for_status()
            items: list[dict[str, Any]] = orjson.loads(response.content)["items"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unavailable(f"the registry's audit log was not read: {error!r}") from None
        return items

    async def settle(self, endpoint: Endpoint) -> None:
        """Tell the registry that an Endpoint's traffic has moved to its new targets.

        If this fails, log the error and raise nothing. The calling code tries again later.
        """
        try:
            response = await self._client.post(
                f"/v1/endpoints/{endpoint.name}/settle", json={"revision": endpoint.revision}
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.info("settling failed; tried again", extra={"endpoint": endpoint.name, "problem": str(error)})

    async def end_shadow(self, endpoint: Endpoint) -> None:
        """End an endpoint's shadow in the registry.

        If this fails, log the error and raise nothing. The calling code tries again later.
        """
        assert endpoint.shadow is not None
        try:
            response = await self._client.delete(
                f"/v1/endpoints/{endpoint.name}/shadow", params={"id": endpoint.shadow.id}
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.info(
                "a shadow could not be ended; the router tries again",
                extra={"endpoint": endpoint.name, "problem": str(error)},
            )

    async def progress(self, endpoint: str, id: str, phase: RolloutPhase, step: int, reason: str) -> bool:
        """Write a decision about a canary. Return False if it was not stored.

        After False, the calling code must try again.
        """
        body = {"id": id, "phase": phase, "step": step, "reason": reason[:2000]}
        return await self._decide(f"/v1/endpoints/{endpoint}/rollout/progress", body)

    async def complete(self, endpoint: str, id: str, reason: str) -> bool:
        """Mark an experiment as complete. Return False if this was not stored.

        After False, the calling code must try again.
        """
        body = {"id": id, "reason": reason[:2000]}
        return await self._decide(f"/v1/endpoints/{endpoint}/experiment/complete", body)

    async def _decide(self, path: str, body: dict[str, Any]) -> bool:
        try:
            response = await self._client.post(path, json=body)
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.info(
                "a decision could not be stored; the router decides again",
                extra={"path": path, "problem": str(error)},
            )
            return False
        return True
