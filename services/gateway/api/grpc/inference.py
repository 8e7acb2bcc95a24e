"""Inference over gRPC: the steps that ``ModelInfer`` and ``ModelStreamInfer`` share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from services.gateway.adapters.model_metadata import ModelMetadataCache
from services.gateway.api.grpc import codec
from services.gateway.api.grpc.call_grouper import CallGrouper
from services.gateway.api.grpc.status import Metadata, code_of, refuse
from services.gateway.api.metrics import CALLER_GONE, GatewayMetrics
from services.gateway.api.server_timing import failure_timing, server_timing
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.feedback import HEADER as FEEDBACK_ID
from services.gateway.application.feedback import PendingId
from services.gateway.application.inference.beside_body import BesideBody
from services.gateway.application.inference.core import (
    MAX_TIMEOUT_MS,
    InferenceCore,
    InferenceResult,
    parse_timeout,
)
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.request_costs import HEADER, RequestCosts
from services.gateway.domain.shared_memory import UsesRegions
from services.gateway.domain.traffic_split import Origin
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import new_request_id
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.sequences import ID

log = telemetry.logger(__name__)


class GrpcInference:
    """The gRPC counterpart of ``api/inference/handler.py``: decode, run the core, encode."""

    def __init__(
        self,
        core: InferenceCore,
        access: Access,
        metadata: ModelMetadataCache,
        metrics: GatewayMetrics,
        log: AccessLog | None = None,
        costs: RequestCosts | None = None,
        beside: BesideBody | None = None,
    ) -> None:
        self.core = core
        self._beside = beside or BesideBody()
        self.access = access
        self.metrics = metrics
        self._feedback = core.feedback
        self.log = log or AccessLog.off()
        self._metadata = metadata
        self._costs = costs
        self._groupers: dict[str, CallGrouper] = {}

    async def infer(self, request: Any, context: Any) -> Any:
        """Handle ``ModelInfer``."""
        started = time.perf_counter()
        rid = context.rid or new_request_id()
        trace = self.log.begin(rid.encode("latin-1"), context.headers.fields)
        try:
            timeout_ms = timeout_of(context)
            response, trailers = await self.answer(
                request, context.principal, rid, timeout_ms, started, context.headers.fields, trace
            )
        except asyncio.CancelledError:
            cancelled = TidegateError("the caller cancelled the call", reason=CALLER_GONE)
            self.refused(request, cancelled, rid, context.principal, started, trace)
            raise
        except TidegateError as error:
            failure = self.refused(request, error, rid, context.principal, started, trace)
            await refuse(context, failure, rid, _failed_after(started))
        except Exception:
            failure = self.internal_error(request, rid, context.principal, started)
            await refuse(context, failure, rid, _failed_after(started))
        else:
            context.set_trailing_metadata(trailers)
            return response

    async def answer(
        self,
        request: Any,
        principal: Principal,
        rid: str,
        timeout_ms: float | None,
        started: float,
        headers: dict[bytes, bytes],
        trace: bytes,
    ) -> tuple[Any, Metadata]:
        """Return the response to a request, and the response's trailers; raise TidegateError.

        ``trace``: the trace field of the request's frame.
        """
        size, cost = request.ByteSize(), UsageCost()
        grant = self.admit(principal, request)
        origin = origin_of(request, headers, principal)
        pending = self.feedback_of(request, origin, rid, principal)
        try:
            answer = await self._run(
                request, trace, timeout_ms, cost, origin, principal, self.decoder(request, headers, principal)
            )
            response, trailers = self.encode(request.model_name, answer, rid, started)
            if pending is not None:
                trailers += add_feedback_id(response, pending, answer)
            if grant is not None:
                cost.add(answer.reply, answer.parameters, response.ByteSize(), answer.route)
                trailers += _limit_trailers(grant)
            if self.log.take():
                self.answered(request, answer, principal, rid, response.ByteSize(), started)
            self.trace_answer(trace, headers, request, answer, started)
        finally:
            if grant is not None:
                grant.streamed(cost, size)
        return response, trailers

    def decoder(
        self, request: Any, headers: dict[bytes, bytes], principal: Principal
    ) -> Callable[[Contract], Decoded]:
        """Return a function that decodes a request, including tensors in the caller's shared memory."""

        def decode(contract: Contract) -> Decoded:
            beside = self._beside.headers(headers) if self._beside.forwards else None
            try:
                return codec.decode(request, contract, beside)
            except UsesRegions as refusal:
                return codec.decode(request, contract, self._beside.memory(headers, principal, refusal))

        return decode

    def admit(self, principal: Principal, request: Any) -> Grant | None:
        """Admit a request if the model exists and the caller's limits allow it; else raise TidegateError."""
        self.core.find(request.model_name, request.model_version)
        return self.access.admit(principal, request.model_name)

    async def _run(
        self,
        request: Any,
        trace: bytes,
        timeout_ms: float | None,
        cost: UsageCost,
        origin: Callable[[], Origin],
        principal: Principal,
        decode: Callable[[Contract], Decoded],
    ) -> InferenceResult:
        model: str = request.model_name
        # A request of a sequence does not wait here, because a later request could overtake it then.
        grouper = None if ID in request.parameters else self._groupers.get(model)
        if grouper is not None:
            await grouper.join()
        try:
            answer = await self.core.infer(
                model,
                request.model_version,
                timeout_ms,
                decode,
                trace,
                cost.begin,
                origin,
                principal,
            )
        finally:
            if grouper is not None:
                grouper.leave()
        if grouper is None:  # create a grouper only after an answer, which shows that the model exists
            grouper = self._groupers.setdefault(model, CallGrouper())
        grouper.learn(answer.reply.compute_us, answer.reply.shared)
        return answer

    def encode(self, model: str, answer: InferenceResult, rid: str, started: float) -> tuple[Any, Metadata]:
        """Return a model's answer as a gRPC response with trailers, and count the answer in the metrics."""
        encoding = time.perf_counter()
        response = self.response(model, answer)
        now = time.perf_counter()
        answer.timing.encode = now - encoding
        total = now - started
        self.metrics.answered(model, answer.route.name, answer.timing, total)
        trailers: Metadata = (("x-request-id", rid), ("server-timing", server_timing(answer, total).decode()))
        if self._costs is not None:
            cost = self._costs.header(answer.route, answer.reply, answer.parameters).decode()
            trailers = (*trailers, (HEADER.decode(), cost))
        return response, trailers

    def feedback_of(
        self, request: Any, origin: Callable[[], Origin], rid: str, principal: Principal
    ) -> PendingId | None:
        """Return an id for feedback about the coming answer; None if the endpoint collects no feedback."""
        model: str = request.model_name
        if model not in self._feedback.endpoints:
            return None
        return self._feedback.begin(model, request.model_version, origin, rid.encode("latin-1"), principal)

    def response(self, model: str, answer: InferenceResult) -> Any:
        """Return a model's answer as a gRPC response."""
        return codec.encode(model, answer, self._metadata.labels(answer.route.name))

    def answered(
        self,
        request: Any,
        answer: InferenceResult,
        principal: Principal,
        rid: str,
        sent: int,
        started: float,
        **more: Any,
    ) -> None:
        """Log an answered request."""
        self.log.answered(
            "grpc",
            request.model_name,
            answer,
            principal,
            rid,
            status="OK",
            received=request.ByteSize(),
            sent=sent,
            total=time.perf_counter() - started,
            **more,
        )

    def trace_answer(
        self,
        trace: bytes,
        headers: dict[bytes, bytes],
        request: Any,
        answer: InferenceResult,
        started: float,
        **more: Any,
    ) -> None:
        """Export the trace of an answered request, if the request is traced or slow."""
        if self.log.traces is not None:
            name = request.model_name
            self.log.trace_answer(trace, headers, "grpc", name, answer, status="OK", started=started, **more)

    def refused(
        self,
        request: Any,
        error: TidegateError,
        rid: str,
        principal: Principal | None,
        started: float,
        trace: bytes = b"",
    ) -> TidegateError:
        """Count and log a failed request; return the error."""
        self.metrics.failed(request.model_name, error)
        more = {"client_id": request.id} if request.id else {}
        status = "CANCELLED" if error.reason == CALLER_GONE else code_of(error).name
        self.log.refused(
            "grpc",
            request.model_name,
            error,
            principal,
            rid,
            status=status,
            received=request.ByteSize(),
            started=started,
            trace=trace,
            **more,
        )
        return error

    def refused_by_head(self, error: TidegateError, rid: str) -> None:
        """Count and log a call that is refused because of its headers."""
        self.metrics.refused("", error.reason)
        self.log.refused("grpc", "", error, None, rid, status=code_of(error).name)

    def internal_error(
        self, request: Any, rid: str, principal: Principal | None, started: float
    ) -> TidegateError:
        """Log an unexpected exception; return the error for the caller."""
        log.exception("unexpected error", extra={"request_id": rid[: telemetry.LONGEST_ID]})
        return self.refused(
            request, TidegateError("internal error; see the log of the service"), rid, principal, started
        )


def timeout_of(context: Any) -> float | None:
    """Return the caller's timeout in ms, or None if the caller set no timeout.

    A caller can set the timeout header, the deadline of the call, or both. If both are set, the shorter time
    counts.

    Raise BadRequest if the timeout header is invalid.
    """
    timeout_ms = parse_timeout(context.headers.request_timeout_ms)
    left_s = context.time_remaining()
    if left_s is not None:
        left_ms = min(max(left_s * 1e3, 0.001), MAX_TIMEOUT_MS)
        timeout_ms = left_ms if timeout_ms is None else min(timeout_ms, left_ms)
    return timeout_ms


def add_feedback_id(response: Any, pending: PendingId, answer: InferenceResult) -> Metadata:
    """Add the id for feedback to the parameters of a response. Return the same id as a trailer."""
    id_ = pending.id(answer.route).decode()
    response.parameters["feedback_id"].string_param = id_
    return ((FEEDBACK_ID.decode(), id_),)


def _failed_after(started: float) -> Metadata:
    return (("server-timing", failure_timing(time.perf_counter() - started).decode()),)


def _limit_trailers(grant: Grant) -> Metadata:
    return tuple((name.decode(), value.decode()) for name, value in grant.headers())


def origin_of(request: Any, headers: dict[bytes, bytes], principal: Principal) -> Callable[[], Origin]:
    """Return a function that returns a request's facts for traffic rules and sticky keys."""
    return lambda: Origin(headers, principal.id, lambda: codec.request_parameters(request))
