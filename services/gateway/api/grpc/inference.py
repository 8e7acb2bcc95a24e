"""Inference over gRPC: one call, or a stream of them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from services.gateway.adapters.model_metadata import ModelMetadataCache
from services.gateway.api.grpc import codec
from services.gateway.api.grpc.micro_batcher import MicroBatcher
from services.gateway.api.grpc.status import Metadata, code_of, refuse
from services.gateway.api.inference.handler import failure_timing, server_timing
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import (
    MAX_TIMEOUT_MS,
    InferenceCore,
    InferenceResult,
    parse_timeout,
)
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.service.app import new_request_id

log = telemetry.logger(__name__)


class GrpcInference:
    """Decode, hand to the core, encode: what ``api/inference/handler.py`` is to HTTP."""

    def __init__(
        self,
        core: InferenceCore,
        access: Access,
        cards: ModelMetadataCache,
        metrics: GatewayMetrics,
        log: AccessLog | None = None,
    ) -> None:
        self.core = core
        self.access = access
        self.metrics = metrics
        self.log = log or AccessLog.off()
        self._cards = cards
        self._companies: dict[str, MicroBatcher] = {}

    async def infer(self, request: Any, context: Any) -> Any:
        """``ModelInfer``."""
        started = time.perf_counter()
        rid = context.rid or new_request_id()
        try:
            timeout_ms = timeout_of(context)
            response, trailers = await self.answer(request, context.principal, rid, timeout_ms, started)
        except asyncio.CancelledError:
            gone = TidegateError("the caller cancelled the call", reason="caller_gone")
            self.refused(request, gone, rid, context.principal, started)
            raise
        except TidegateError as error:
            told = self.refused(request, error, rid, context.principal, started)
            await refuse(context, told, rid, _failed_after(started))
        except Exception:
            told = self.broken(request, rid, context.principal, started)
            await refuse(context, told, rid, _failed_after(started))
        else:
            context.set_trailing_metadata(trailers)
            return response

    async def answer(
        self, request: Any, principal: Principal, rid: str, timeout_ms: float | None, started: float
    ) -> tuple[Any, Metadata]:
        """The response to a request and the trailers that go with it; raises TidegateError."""
        size, cost = request.ByteSize(), UsageCost()
        grant = self.admit(principal, request)
        try:
            answer = await self._ask(request, rid, timeout_ms, cost)
            response, trailers = self.encode(request.model_name, answer, rid, started)
            if grant is not None:
                cost.add(answer.reply, answer.parameters, response.ByteSize())
                trailers += _told(grant)
            if self.log.take():
                self.answered(request, answer, principal, rid, response.ByteSize(), started)
        finally:
            if grant is not None:
                grant.streamed(cost, size)
        return response, trailers

    def admit(self, principal: Principal, request: Any) -> Grant | None:
        """Let a request to a model that is there in; raises TidegateError."""
        self.core.pick(request.model_name, request.model_version)
        return self.access.admit(principal, request.model_name)

    async def _ask(
        self, request: Any, rid: str, timeout_ms: float | None, cost: UsageCost
    ) -> InferenceResult:
        model: str = request.model_name
        company = self._companies.get(model)
        if company is not None:
            await company.join()
        try:
            answer = await self.core.infer(
                model,
                request.model_version,
                timeout_ms,
                lambda contract: codec.decode(request, contract),
                rid.encode("latin-1"),
                cost.begin,
            )
        finally:
            if company is not None:
                company.leave()
        if company is None:  # only of models that there are
            company = self._companies.setdefault(model, MicroBatcher())
        company.learn(answer.reply.compute_us, answer.reply.shared)
        return answer

    def encode(self, model: str, answer: InferenceResult, rid: str, started: float) -> tuple[Any, Metadata]:
        """An answer as a response, counted, and its trailers."""
        encoding = time.perf_counter()
        response = self.response(model, answer)
        now = time.perf_counter()
        answer.timing.encode = now - encoding
        total = now - started
        self.metrics.answered(model, answer.route.name, answer.timing, total)
        return response, (("x-request-id", rid), ("server-timing", server_timing(answer, total).decode()))

    def response(self, model: str, answer: InferenceResult) -> Any:
        """An answer as a response."""
        return codec.encode(model, answer, self._cards.labels(answer.route.name))

    def answered(
        self,
        request: Any,
        answer: InferenceResult,
        who: Principal,
        rid: str,
        sent: int,
        started: float,
        **more: Any,
    ) -> None:
        """Log a request that was answered."""
        self.log.answered(
            "grpc",
            request.model_name,
            answer,
            who,
            rid,
            status="OK",
            received=request.ByteSize(),
            sent=sent,
            total=time.perf_counter() - started,
            **more,
        )

    def refused(
        self, request: Any, error: TidegateError, rid: str, who: Principal | None, started: float
    ) -> TidegateError:
        """The error, counted and logged."""
        self.metrics.refused(request.model_name, error.reason)
        more = {"client_id": request.id} if request.id else {}
        status = "CANCELLED" if error.reason == "caller_gone" else code_of(error).name
        self.log.refused(
            "grpc",
            request.model_name,
            error,
            who,
            rid,
            status=status,
            received=request.ByteSize(),
            total=time.perf_counter() - started,
            **more,
        )
        return error

    def refused_by_head(self, error: TidegateError, rid: str) -> None:
        """Count and log a call that is refused before its message has come."""
        self.metrics.refused("", error.reason)
        self.log.refused("grpc", "", error, None, rid, status=code_of(error).name)

    def broken(self, request: Any, rid: str, who: Principal | None, started: float) -> TidegateError:
        """What a caller is told of an exception that nobody expected."""
        log.exception("unexpected error", extra={"request_id": rid[: telemetry.LONGEST_ID]})
        return self.refused(
            request, TidegateError("internal error; see the log of the service"), rid, who, started
        )


def timeout_of(context: Any) -> float | None:
    """Return how long a caller waits, in ms; None: as usual. Raises BadRequest."""
    timeout_ms = parse_timeout(context.head.asked_ms)
    left_s = context.time_remaining()
    if left_s is not None:
        left_ms = min(max(left_s * 1e3, 0.001), MAX_TIMEOUT_MS)
        timeout_ms = left_ms if timeout_ms is None else min(timeout_ms, left_ms)
    return timeout_ms


def _failed_after(started: float) -> Metadata:
    return (("server-timing", failure_timing(time.perf_counter() - started).decode()),)


def _told(grant: Grant) -> Metadata:
    return tuple((name.decode(), value.decode()) for name, value in grant.headers())
