"""What the gateway asks the router for, in the name of its caller."""

from __future__ import annotations

from typing import Any

import httpx

from tidegate.kernel.errors import Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.service import caller

TIMEOUT_S = 5.0


class RouterClient:
    """The router's HTTP door; every failure is ``Unavailable``."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            trust_env=False,
            verify=trusted(url),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def webhook_secret(self) -> dict[str, Any]:
        """The secret of the caller at hand."""
        try:
            answer = await self._client.get("/v1/webhooks/secret", headers=caller.onward())
            answer.raise_for_status()
            told: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"the router does not answer: {reason}", retry_after_s=2.0) from error
        return told
