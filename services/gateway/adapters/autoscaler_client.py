"""A client of the autoscaler's HTTP API, for operations on behalf of a caller."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from tidegate.kernel.errors import BY_REASON, TidegateError, Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.service import caller

TIMEOUT_S = 10.0


class AutoscalerClient:
    """A client of the autoscaler. It connects at the first call.

    Each call also sends the current caller's identity.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def pause(self, deployment: str) -> None:
        """Keep a Deployment at 0 replicas until :meth:`resume`. Raise TidegateError if this fails."""
        await self._post(f"/v1/deployments/{deployment}/pause", {})

    async def resume(self, deployment: str) -> None:
        """Let the policy decide the number of replicas again. Raise TidegateError if this fails."""
        await self._post(f"/v1/deployments/{deployment}/resume", None)

    async def hold(self, deployment: str, replicas: int) -> None:
        """Keep a Deployment at a fixed number of replicas. Raise TidegateError if this fails."""
        await self._send("PUT", f"/v1/deployments/{deployment}/replicas", {"replicas": replicas})

    async def _post(self, path: str, body: dict[str, str] | None) -> None:
        await self._send("POST", path, body)

    async def _send(self, method: str, path: str, body: Mapping[str, str | int] | None) -> None:
        if self._http is None:
            self._http = httpx.AsyncClient(
                base_url=self._url, timeout=TIMEOUT_S, trust_env=False, verify=trusted(self._url)
            )
        headers = caller.onward() | {"authorization": f"Bearer {self._token}"}
        try:
            answer = await self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Unavailable(f"the autoscaler does not answer: {why}", retry_after_s=2.0) from error
        if answer.status_code >= 400:
            raise _error_of(answer)


def _error_of(answer: httpx.Response) -> TidegateError:
    try:
        body = answer.json()
        reason, message = str(body["reason"]), str(body["error"])
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"the autoscaler answered {answer.status_code}", retry_after_s=2.0)
    return BY_REASON.get(reason, Unavailable)(message, reason=reason)
