"""Turn the headers and body of an inference call over HTTP into a response.

Both the hot path and the ASGI fallback use this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import orjson

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.compression import HttpResponse, deliver
from services.gateway.api.decompression import inflated
from services.gateway.api.inference.request_target import SUBMIT_JOB, Target
from services.gateway.api.inference.unfinished_uploads import UnfinishedUploads
from services.gateway.api.job_submission import JobSubmissionHandler
from services.gateway.api.metrics import CALLER_GONE, GatewayMetrics
from services.gateway.api.server_timing import failure_timing, server_timing
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.feedback import HEADER as FEEDBACK_ID
from services.gateway.application.feedback import PendingId
from services.gateway.application.inference.beside_body import BesideBody
from services.gateway.application.inference.core import InferenceCore, InferenceResult, parse_timeout
from services.gateway.domain import oip, usage_cost
from services.gateway.domain.classification import Labels
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.request_costs import HEADER, RequestCosts
from services.gateway.domain.shared_memory import UsesRegions
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.errors import (
    BadRequest,
    Forbidden,
    TidegateError,
    TooMany,
    Unauthorized,
    whole_seconds,
)
from tidegate.kernel.http.answers import Refusal, error_body, new_request_id
from tidegate.kernel.http.heads import is_local, number
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.protocol.usage import tokens
from tidegate.kernel.service.error_answers import status_of

log = telemetry.logger(__name__)

# The status in the log if the caller closed the connection. It is never sent. nginx logs the same number.
CLIENT_CLOSED = 499
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


class InferenceHandler:
    """The steps of a call: decode, run the core, encode. Every failure becomes an error response."""

    def __init__(
        self,
        core: InferenceCore,
        *,
        access: Access,
        limits: BodyLimits,
        local_only: bool,
        metrics: GatewayMetrics,
        log: AccessLog | None = None,
        labels: Callable[[str], Labels] = lambda _: {},
        jobs: JobSubmissionHandler | None = None,
        body_bytes_per_s: int = 1024,
        costs: RequestCosts | None = None,
        beside: BesideBody | None = None,
    ) -> None:
        self._costs = costs
        self._core = core
        self._beside = beside or BesideBody()
        self._access = access
        self._labels = labels
        self._jobs = jobs
        self._local_only = local_only
        self._metrics = metrics
        self._feedback = core.feedback
        self._log = log or AccessLog.off()
        self._inflated: dict[bytes, Body] = {}
        self._grants: dict[bytes, Grant] = {}
        self.limits = limits
        self.uploads = UnfinishedUploads(limits.bodies, body_bytes_per_s)

    def check_headers(self, headers: Headers) -> TidegateError | None:
        """Return the error if a request must be refused because of its headers, else None."""
        try:
            principal = self._caller(headers)
        except TidegateError as error:
            return error
        return self.limits.check_headers(headers, known=principal is not ANONYMOUS)

    def knows(self, headers: Headers) -> bool:
        """Return True if the credential in these headers was checked recently and was valid."""
        return self._access.remembers(headers)

    def _caller(self, headers: Headers) -> Principal:
        if self._local_only and not is_local(headers):
            raise Forbidden(
                "this address answers only callers on its own host: send a loopback address in the header "
                "Host, and no Origin or Sec-Fetch-Site of another site"
            )
        return self._access.authenticate(headers)

    def begin(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        done: Callable[[HttpResponse], None],
        started: float | None = None,
    ) -> bytes | None:
        """Start the call. Return the id of the request in flight; None for a job or a refused request.

        ``done`` is called with the response, perhaps before this method returns. The calling code must not
        change ``body`` after this call, because its tensors are sent without a copy. ``started``: the time of
        ``time.perf_counter`` when the body was complete; None means now.
        """
        started = started or time.perf_counter()
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        model = target.model
        principal = None
        try:
            principal = self._caller(headers)
            if b"content-encoding" in headers:
                return self._begin_compressed(target, headers, body, done, started)
            length = parse_header_length(headers)
            self.limits.check_json(len(body) if length is None else length)
            if self._jobs is not None and (prefer := self._jobs.preference(target, headers)) is not None:
                self._jobs.begin(
                    target,
                    headers,
                    body,
                    length,
                    principal,
                    prefer,
                    rid,
                    done,
                    lambda error: done(
                        self._error_response(model, error, rid, started, principal, len(body), headers, "job")
                    ),
                )
                return None
            return self._infer(target, headers, body, length, principal, rid, done, started)
        except TidegateError as error:
            protocol = "job" if target is SUBMIT_JOB else "rest"
            done(self._error_response(model, error, rid, started, principal, len(body), headers, protocol))
        except Exception:
            done(self._internal_error(model, rid, started, principal))
        return None

    def _infer(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        rid: bytes,
        done: Callable[[HttpResponse], None],
        started: float,
    ) -> bytes:
        model, version = target
        timeout_ms = parse_timeout(headers.get(b"x-request-timeout-ms"))
        grant = self._access.admit(principal, model)
        received = len(body)
        trace = self._log.begin(rid, headers)
        pending = (
            self._pending_id(target, headers, body, length, principal, rid)
            if model in self._feedback.endpoints
            else None
        )

        def on_outcome(outcome: InferenceResult | TidegateError) -> None:
            try:
                if isinstance(outcome, TidegateError):
                    raise outcome
                response = self._respond(model, outcome, rid, started, pending)
                if self._log.take():
                    self._answered(model, outcome, principal, rid, received, response, started, headers)
                if self._log.traces is not None:
                    self._log.trace_answer(
                        trace, headers, "rest", model, outcome, status=200, started=started
                    )
            except TidegateError as error:
                response = self._error_response(
                    model, error, rid, started, principal, received, headers, trace=trace
                )
            except Exception:
                response = self._internal_error(model, rid, started, principal)
            if grant is not None:
                self._grants.pop(id_, None)
                _account(grant, outcome, received, response)
            if b"accept-encoding" in headers:
                deliver(response, headers, done)
            else:
                done(response)

        try:
            id_ = self._core.begin(
                model,
                version,
                timeout_ms,
                self._decoder(headers, body, length, principal),
                trace,
                on_outcome,
                lambda: Origin(headers, principal.id, lambda: oip.request_parameters(body, length)),
                principal,
            )
        except BaseException:
            if grant is not None:
                grant.cancel()
            raise
        if grant is not None:
            self._grants[id_] = grant
        return id_

    def _decoder(
        self, headers: Headers, body: Buffer, length: int | None, principal: Principal
    ) -> Callable[[Contract], Decoded]:
        """Return a function that decodes a request, including tensors in the caller's shared memory."""
        forwarded = self._beside.headers(headers) if self._beside.forwards else None

        def decode(contract: Contract) -> Decoded:
            try:
                return oip.decode(body, length, contract, forwarded)
            except UsesRegions as refusal:
                memory = self._beside.memory(headers, principal, refusal)
                return oip.decode(body, length, contract, memory)

        return decode

    def _pending_id(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        rid: bytes,
    ) -> PendingId | None:
        """Return a feedback id for the coming answer; None if the endpoint collects no feedback.

        The id is not complete: the Deployment of the answer is still missing. The returned object keeps no
        reference to ``body``, so the memory of the body can be freed before the answer.
        """

        def origin() -> Origin:
            return Origin(headers, principal.id, lambda: oip.request_parameters(body, length))

        return self._feedback.begin(target.model, target.version, origin, rid, principal)

    def _begin_compressed(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        done: Callable[[HttpResponse], None],
        started: float,
    ) -> bytes | None:
        unpacked = inflated(body, headers, self.limits, known=self.knows(headers))
        rest = {name: value for name, value in headers.items() if name != b"content-encoding"}
        if unpacked is None:
            return self.begin(target, rest, body, done, started)
        id_: bytes | None = None

        def finished(response: HttpResponse) -> None:
            unpacked.release()
            if id_ is not None:
                self._inflated.pop(id_, None)
            done(response)

        id_ = self.begin(target, rest, unpacked.whole(), finished, started)
        if id_ is not None:
            self._inflated[id_] = unpacked
        return id_

    def abandon(self, id_: bytes, target: Target, headers: Headers) -> None:
        """Cancel a request whose caller closed the connection, and log it."""
        self._core.abandon(id_)
        unpacked = self._inflated.pop(id_, None)
        if unpacked is not None:
            unpacked.release()
        grant = self._grants.pop(id_, None)
        if grant is not None:
            grant.done(failed=True)
        model = target.model
        self._metrics.refused(model, CALLER_GONE)
        error = TidegateError(
            "the caller closed the connection before the answer was sent", reason=CALLER_GONE
        )
        rid = telemetry.shown_id(headers.get(b"x-request-id", b""))
        principal = self._access.remembered(headers)
        self._log.refused("rest", model, error, principal, rid, status=CLIENT_CLOSED, headers=headers)

    def refuse(self, target: Target, headers: Headers, error: TidegateError) -> HttpResponse:
        """Return the response to a request that is refused before its body is complete."""
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        principal = self._access.remembered(headers)
        return self._error_response(
            target.model, error, rid, time.perf_counter(), principal, request_headers=headers
        )

    def log_rejection(self, refusal: Refusal, rid: str) -> None:
        """Log a request that ``HotPathProtocol`` refused, for example because the request is malformed."""
        error = TidegateError(refusal.message, reason=refusal.reason)
        self._log.refused("rest", "", error, None, rid, status=refusal.status)

    def _respond(
        self, model: str, answer: InferenceResult, rid: bytes, started: float, pending: PendingId | None
    ) -> HttpResponse:
        encoding = time.perf_counter()
        body, tail = oip.encode(
            model,
            answer.route.version,
            answer.request,
            answer.rows,
            answer.outputs,
            answer.parameters,
            answer.reply.data,
            self._labels(answer.route.name),
        )
        now = time.perf_counter()
        timing, total = answer.timing, now - started
        timing.encode = now - encoding
        self._metrics.answered(model, answer.route.name, timing, total)
        headers = [
            _BINARY if tail else _JSON,
            (b"content-length", b"%d" % (len(body) + sum(map(len, tail)))),
            (b"x-request-id", rid),
            (b"server-timing", server_timing(answer, total)),
        ]
        if self._costs is not None:
            cost = self._costs.header(answer.route, answer.reply, answer.parameters)
            headers.append((HEADER, cost))
        if tail:
            headers.append((_HEADER_LENGTH, b"%d" % len(body)))
        if pending is not None:
            headers.append((FEEDBACK_ID, pending.id(answer.route)))
        return HttpResponse(200, headers, body, tail)

    def _answered(
        self,
        model: str,
        answer: InferenceResult,
        principal: Principal,
        rid: bytes,
        received: int,
        response: HttpResponse,
        started: float,
        headers: Headers,
    ) -> None:
        self._log.answered(
            "rest",
            model,
            answer,
            principal,
            telemetry.shown_id(rid),
            status=200,
            received=received,
            sent=len(response.body) + sum(map(len, response.tail)),
            total=time.perf_counter() - started,
            headers=headers,
        )

    def _error_response(
        self,
        model: str,
        error: TidegateError,
        rid: bytes,
        started: float,
        principal: Principal | None = None,
        received: int = 0,
        request_headers: Headers | None = None,
        protocol: str = "rest",
        trace: bytes = b"",
    ) -> HttpResponse:
        self._metrics.failed(model, error)
        self._log.refused(
            protocol,
            model,
            error,
            principal,
            telemetry.shown_id(rid),
            status=status_of(error),
            received=received,
            started=started,
            headers=request_headers,
            trace=trace,
        )
        body = orjson.dumps(error_body(for_caller(error), error.reason, rid.decode("latin-1")))
        headers = [
            _JSON,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", rid),
            (b"server-timing", failure_timing(time.perf_counter() - started)),
        ]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % whole_seconds(error.retry_after_s)))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        elif isinstance(error, TooMany):
            headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        return HttpResponse(status_of(error), headers, body)

    def _internal_error(
        self, model: str, rid: bytes, started: float, principal: Principal | None
    ) -> HttpResponse:
        log.exception("unexpected error", extra={"request_id": telemetry.shown_id(rid)})
        error = TidegateError("internal error; see the log of the service")
        return self._error_response(model, error, rid, started, principal)


def _account(
    grant: Grant, outcome: InferenceResult | TidegateError, received: int, response: HttpResponse
) -> None:
    """Record the usage of an admitted request. Add headers with the caller's limits to the response."""
    if isinstance(outcome, InferenceResult):
        tokens_in, tokens_out = tokens(outcome.parameters) if outcome.parameters else (0, 0)
        grant.done(
            compute_us=usage_cost.compute_us(outcome.reply),
            received=received,
            sent=len(response.body) + sum(map(len, response.tail)) if response.tail else len(response.body),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            failed=response.status != 200,
            route=outcome.route,
            whole_us=outcome.reply.compute_us,
        )
    else:
        grant.done(received=received, failed=True)
    response.headers.extend(grant.headers())


def parse_header_length(headers: Headers) -> int | None:
    """Return the size of the body's JSON part in bytes; None if the whole body is JSON.

    Raise BadRequest if the header that declares the size is not a number.
    """
    raw = headers.get(_HEADER_LENGTH)
    if raw is None:
        return None
    length = number(raw)
    if length is None:
        shown = raw[:40].decode("latin-1")
        raise BadRequest(f"{oip.HEADER_LENGTH} must be a number of bytes, got {shown!r}")
    return length
