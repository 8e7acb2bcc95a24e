"""Load, unload and scale models for clients of Triton and TorchServe, through operations on Deployments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain import model_control
from services.gateway.domain.model_control import Allowed
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from tidegate.kernel.errors import Conflict, DeadlinePassed, Forbidden, ModelFailed, NotFound, Unavailable
from tidegate.kernel.protocol.access import INFER, OPERATE, Principal, may_not_use
from tidegate.kernel.service import caller
from tidegate.kernel.service.caller import Caller

# The longest time to wait for a load, and for an unload, in seconds. An unload that takes longer continues
# after the response.
LOAD_S, UNLOAD_S = 600.0, 60.0
# The longest time until the route table shows a change of the registry.
TABLE_S = 30.0
POLL_S, WAKE_EVERY_S = 0.05, 1.0


class Operations(Protocol):
    """The operations of the autoscaler that :class:`ModelControl` uses."""

    async def pause(self, deployment: str) -> None:
        """Keep a Deployment at 0 replicas until :meth:`resume` is called."""

    async def resume(self, deployment: str) -> None:
        """Let the policy of a Deployment choose its number of replicas."""

    async def hold(self, deployment: str, replicas: int) -> None:
        """Keep a Deployment at a fixed number of replicas until :meth:`resume` is called."""


class ModelControl:
    """Loads, unloads and scales models. ``allowed``: the callers that may do this."""

    def __init__(self, core: InferenceCore, operations: Operations, allowed: Allowed) -> None:
        self._core = core
        self._operations = operations
        self._allowed = allowed

    async def load(
        self,
        model: str,
        parameters: Mapping[str, Any],
        principal: Principal,
        timeout_ms: float | None = None,
    ) -> None:
        """Wake a model, even if it is paused. Return when it is ready.

        Raise a TidegateError if the caller may not load the model, or if the model is not ready in time.
        ``timeout_ms``: the longest time to wait; None means ``LOAD_S`` seconds.
        """
        self._permit(model, principal)
        model_control.check_parameters(model, parameters)
        endpoint = self._endpoint(model, "load")
        with _acting(principal):
            for route in model_control.deployments_of(endpoint):
                if not route.wakeable:
                    await self._operations.resume(route.name)
        await self._until_ready(model, LOAD_S if timeout_ms is None else timeout_ms / 1e3)

    async def unload(self, model: str, principal: Principal) -> None:
        """Set every version of a model to 0 replicas.

        Return when no version answers requests, or after ``UNLOAD_S`` seconds. Raise a TidegateError if the
        model may not be unloaded.
        """
        self._permit(model, principal)
        endpoint = self._endpoint(model, "unload")
        model_control.check_unshared(endpoint, self._core.table().endpoints.values())
        with _acting(principal):
            for route in model_control.deployments_of(endpoint):
                await self._operations.pause(route.name)
        end = time.monotonic() + UNLOAD_S
        while time.monotonic() < end and any(map(self._answers, self._routes(model, "unload"))):
            await asyncio.sleep(POLL_S)

    async def scale(
        self, model: str, version: str, replicas: int, principal: Principal, *, wait: bool
    ) -> None:
        """Set a fixed number of replicas for a version of a model.

        If ``version`` is empty, set the number for every target of the model's Endpoint. With ``wait``,
        return when that many replicas are ready. Raise a TidegateError if the caller may not scale the model,
        or if the replicas are not ready in time.
        """
        self._permit(model, principal)
        endpoint = self._endpoint(model, "scale")
        routes = [self._core.find(model, version)[1]] if version else model_control.targets_of(endpoint)
        with _acting(principal):
            for route in routes:
                await self._operations.hold(route.name, replicas)
        end = time.monotonic() + LOAD_S
        while wait and any(self._core.fleet(route.name).ready < replicas for route in routes):
            if time.monotonic() > end:
                raise DeadlinePassed(
                    f"{model!r} does not have {replicas} workers after {LOAD_S:g} s. More are still "
                    f"starting: see `tidegate why {routes[0].name}`"
                )
            await asyncio.sleep(POLL_S)

    def _permit(self, model: str, principal: Principal) -> None:
        if self._allowed == "off":
            raise Unavailable(
                f"{model_control.NOT_ALLOWED}: an operator allows it with TIDEGATE_MODEL_CONTROL=operate"
            )
        if self._allowed == "operate":
            caller.permit(principal, (OPERATE,))
        elif not principal.may(OPERATE) and not principal.may(INFER, model):
            raise Forbidden(may_not_use(principal, model))

    def _endpoint(self, model: str, action: str) -> EndpointRoute:
        endpoint = self._core.table().endpoints.get(model)
        if endpoint is None:
            raise NotFound(
                f"failed to {action} {model!r}, failed to poll from model repository: no such model. "
                "GET /v2/models lists all; `tidegate deploy` adds one"
            )
        return endpoint

    def _routes(self, model: str, action: str) -> list[DeploymentRoute]:
        return model_control.deployments_of(self._endpoint(model, action))

    def _answers(self, route: DeploymentRoute) -> bool:
        return route.wakeable or self._core.fleet(route.name).ready > 0

    async def _until_ready(self, model: str, limit_s: float) -> None:
        began, woken = time.monotonic(), 0.0
        while True:
            targets = model_control.targets_of(self._endpoint(model, "load"))
            waiting = [route for route in targets if not self._core.fleet(route.name).ready]
            if not waiting:
                return
            spent = time.monotonic() - began
            for route in waiting:
                self._check_progress(model, route, spent, limit_s)
            if spent >= woken:
                woken = spent + WAKE_EVERY_S
                for route in waiting:
                    self._core.wake(route)
            await asyncio.sleep(POLL_S)

    def _check_progress(self, model: str, route: DeploymentRoute, spent: float, limit_s: float) -> None:
        """Raise a TidegateError if a Deployment cannot become ready, or takes longer than ``limit_s``."""
        if not route.wakeable:
            if spent > TABLE_S:
                raise Conflict(
                    f"failed to load {model!r}, its Deployment {route.name} may not start a replica: see "
                    f"`tidegate why {route.name}`"
                )
        elif fault := self._core.fleet(route.name).fault:
            raise ModelFailed(f"failed to load {model!r}, {fault}")
        if spent > limit_s:
            raise DeadlinePassed(
                f"failed to load {model!r}, it is not ready after {limit_s:g} s. It may be ready later: see "
                f"`tidegate why {route.name}`"
            )


class _acting:  # noqa: N801  a context manager
    """Run operations in the name of the principal.

    If the principal lacks the scope ``operate``, run them in the name of the stack itself.
    """

    def __init__(self, principal: Principal) -> None:
        present = caller.current.get()
        self._caller = Caller(
            principal if principal.may(OPERATE) else caller.OWN_WORK.principal, present.origin
        )

    def __enter__(self) -> None:
        self._mark = caller.current.set(self._caller)

    def __exit__(self, *_: object) -> None:
        caller.current.reset(self._mark)
