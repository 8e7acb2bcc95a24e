"""Reads intention from the registry, and tells it when a roll-over is complete."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
from pydantic import ValidationError

from tidegate.kernel import telemetry
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.protocol.models import DesiredState, Endpoint

log = telemetry.logger(__name__)


class RegistryCache:
    """The last good intention. With the registry away, what was known goes on; it is kept on disk too."""

    def __init__(self, url: str, token: str, disk: Path) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=5.0,
            verify=trusted(url, trust_env=True),
        )
        self._disk = disk
        self.desired: DesiredState | None = None
        self.problem: str | None = "The registry has not been read yet."

    def load(self) -> None:
        """Start from the copy on disk, if there is one."""
        with contextlib.suppress(OSError, ValidationError):
            self.desired = DesiredState.model_validate_json(self._disk.read_bytes())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def refresh(self) -> None:
        """Read intention anew; a failure leaves the last one in place and is noted in ``problem``."""
        try:
            answer = await self._client.get("/v1/intention")
            answer.raise_for_status()
            desired = DesiredState.model_validate_json(answer.content)
        except (httpx.HTTPError, ValidationError) as error:
            self.problem = f"The registry does not answer: {error or type(error).__name__}"
            return
        self.problem = None
        if self.desired is None or desired.revision != self.desired.revision:
            self._disk.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._disk.with_suffix(f".{os.getpid()}")  # other routers write too
            fresh.write_bytes(answer.content)
            fresh.replace(self._disk)
        self.desired = desired

    async def settle(self, endpoint: Endpoint) -> None:
        """Say that an endpoint's traffic has moved to its targets."""
        try:
            answer = await self._client.post(
                f"/v1/endpoints/{endpoint.name}/settle", json={"revision": endpoint.revision}
            )
            answer.raise_for_status()
        except httpx.HTTPError as error:
            log.info("settling failed; tried again", extra={"endpoint": endpoint.name, "problem": str(error)})
