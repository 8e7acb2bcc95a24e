"""A client of the registry's HTTP API, with the calls that the autoscaler needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import httpx

from tidegate.kernel.errors import BY_REASON, BadRequest, TidegateError, Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.protocol.models import Deployment, DeploymentSpec, DesiredState
from tidegate.kernel.protocol.reserves import with_reserves
from tidegate.kernel.protocol.verification import ScratchTask, VerificationResult
from tidegate.kernel.service import caller

TIMEOUT_S = 5.0


class RegistryClient:
    """A client of the registry. Its methods raise ``Unavailable`` if the registry does not answer."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=trusted(url)
        )
        self._desired: DesiredState | None = None
        self._etag = ""  # of self._desired

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def desired_state(self) -> DesiredState:
        """Return the desired state. The calling code must not change it."""
        known = {"If-None-Match": self._etag} if self._etag else {}
        # This is the old name of /v1/desired-state. During an upgrade, the registry may still be an older
        # version, which knows only this name.
        response = await self._send("GET", "/v1/intention", headers=known)
        if response.status_code == 304 and self._desired is not None:
            return self._desired
        try:
            desired = with_reserves(DesiredState.model_validate_json(response.content))
        except ValueError as error:
            raise Unavailable(f"The registry sent a desired state that is not valid: {error}") from error
        self._desired, self._etag = desired, response.headers.get("ETag", "")
        return desired

    async def put_override(
        self, deployment: str, replicas: int, ttl_s: float | None, *, force: bool = False
    ) -> None:
        """Set the override of a Deployment for ``ttl_s`` seconds. None: until the override is removed.

        ``force`` allows more replicas than the Deployment's maximum.
        """
        body: dict[str, Any] = {"replicas": replicas}
        if force:
            body["force"] = True
        if ttl_s is not None:
            body["ttl_s"] = ttl_s
        await self._call("PUT", f"{_path(deployment)}/override", body)

    async def remove_override(self, deployment: str) -> None:
        """Remove the override of a Deployment."""
        await self._call("DELETE", f"{_path(deployment)}/override")

    async def put_replicas(self, artifacts: dict[str, str]) -> None:
        """Report the replicas that run, each with the sha256 of the artifact that it may read."""
        await self._call("PUT", "/v1/replicas", {"artifacts": artifacts})

    async def verification_task(self, model: str, number: int) -> tuple[DeploymentSpec, ScratchTask]:
        """Return the Deployment of a version's scratch replica, and the task with the samples to check."""
        raw = await self._call("GET", f"{_version(model, number)}/verification/task")
        found = json.loads(raw)
        return DeploymentSpec.model_validate(found["deployment"]), ScratchTask.model_validate(found["task"])

    async def put_verification(self, model: str, number: int, result: VerificationResult) -> None:
        """Write the result of a version's verification to the registry."""
        body = result.model_dump(mode="json")
        await self._call("PUT", f"{_version(model, number)}/verification/result", body)

    async def patch_policy(self, deployment: str, changes: dict[str, Any]) -> Deployment:
        """Change how a Deployment scales, and return the Deployment."""
        raw = await self._call("PATCH", f"{_path(deployment)}/policy", changes)
        return Deployment.model_validate_json(raw)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        return (await self._send(method, path, body)).content

    async def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> httpx.Response:
        headers = {**caller.onward(), **headers}
        try:
            response = await self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise Unavailable(f"The registry does not answer: {error or type(error).__name__}.") from error
        if response.status_code >= 400:
            raise _error(response)
        return response


def _path(deployment: str) -> str:
    # The name comes from a caller and may contain a slash. Quoting keeps the name one segment of the URL
    # path.
    return f"/v1/deployments/{quote(deployment, safe='')}"


def _version(model: str, number: int) -> str:
    return f"/v1/models/{quote(model, safe='')}/versions/{number}"


def _error(response: httpx.Response) -> TidegateError:
    try:
        body = response.json()
        message, reason = str(body["error"]), str(body["reason"])
    except (ValueError, KeyError, TypeError):
        message, reason = response.text[:200], ""
    if response.status_code >= 500:
        return Unavailable(f"The registry failed: {message}")
    return BY_REASON.get(reason, BadRequest)(message)
