"""A client of the router's HTTP API, for requests on behalf of a caller."""

from __future__ import annotations

from typing import Any

import httpx

from tidegate.kernel.errors import Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.service import caller

TIMEOUT_S = 5.0


class RouterClient:
    """A client of the router. Every failure raises ``Unavailable``."""

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
        """Return the webhook secret of the current caller."""
        try:
            response = await self._client.get("/v1/webhooks/secret", headers=caller.onward())
            response.raise_for_status()
            secret: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"the router does not answer: {reason}", retry_after_s=2.0) from error
        return secret
