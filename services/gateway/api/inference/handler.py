"""One inference call over HTTP, whichever way its bytes come: headers and body in, a response out."""

from __future__ import annotations

import time
from collections.abc import Callable

import orjson

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.compression import HttpResponse, deliver
from services.gateway.api.decompression import inflated
from services.gateway.api.inference.target import SUBMIT_JOB, Target
from services.gateway.api.inference.unfinished_uploads import UnfinishedUploads
from services.gateway.api.job_submission import JobSubmissionHandler
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import InferenceCore, InferenceResult, parse_timeout
from services.gateway.domain import oip, usage_cost
from services.gateway.domain.classification import Labels
from tidegate.kernel import telemetry
from tidegate.kernel.errors import (
    BadRequest,
    Forbidden,
    TidegateError,
    TooMany,
    Unauthorized,
    whole_seconds,
)
from tidegate.kernel.http.answers import Refusal
from tidegate.kernel.http.heads import is_local, number
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.protocol.usage import tokens
from tidegate.kernel.service.app import error_body, new_request_id, status_of

log = telemetry.logger(__name__)

CALLER_GONE = "caller_gone"
# No status is sent to a caller that has gone; logs of web servers have this one.
CLIENT_CLOSED = 499
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


class InferenceHandler:
    """Decode, hand to the core, encode. Every way to fail becomes a response in the protocol's shape."""

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
    ) -> None:
        self._core = core
        self._access = access
        self._labels = labels
        self._jobs = jobs
        self._local_only = local_only
        self._metrics = metrics
        self._log = log or AccessLog.off()
        self._inflated: dict[bytes, Body] = {}
        self._grants: dict[bytes, Grant] = {}
        self.limits = limits
        self.uploads = UnfinishedUploads(limits.bodies, body_bytes_per_s)

    def at_head(self, headers: Headers) -> TidegateError | None:
        """Why a request is refused before its body has come, or None."""
        try:
            principal = self._caller(headers)
        except TidegateError as error:
            return error
        return self.limits.at_head(headers, known=principal is not ANONYMOUS)

    def knows(self, headers: Headers) -> bool:
        """Return True if these headers have a credential that was found good lately."""
        return self._access.remembers(headers)

    def _caller(self, headers: Headers) -> Principal:
        if self._local_only and not is_local(headers):
            raise Forbidden(
                "this address answers only to local callers: the Host, Origin or Sec-Fetch-Site header is "
                "missing or foreign"
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
        """Start the call; gives the id of what is under way, or None when ``done`` was called already.

        Nobody may change ``body`` any more: its tensors are sent from where they are. ``started``: when it
        was whole, on the clock ``time.perf_counter``, if that was before now.
        """
        started = started or time.perf_counter()
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        model, version = target
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
                        self._refuse(model, error, rid, started, principal, len(body), headers, "job")
                    ),
                )
                return None
            return self._infer(model, version, headers, body, length, principal, rid, done, started)
        except TidegateError as error:
            protocol = "job" if target is SUBMIT_JOB else "rest"
            done(self._refuse(model, error, rid, started, principal, len(body), headers, protocol))
        except Exception:
            done(self._broken(model, rid, started, principal))
        return None

    def _infer(
        self,
        model: str,
        version: str,
        headers: Headers,
        body: Buffer,
        length: int | None,
        principal: Principal,
        rid: bytes,
        done: Callable[[HttpResponse], None],
        started: float,
    ) -> bytes:
        timeout_ms = parse_timeout(headers.get(b"x-request-timeout-ms"))
        grant = self._access.admit(principal, model)
        received = len(body)

        def on_outcome(outcome: InferenceResult | TidegateError) -> None:
            try:
                if isinstance(outcome, TidegateError):
                    raise outcome
                response = self._respond(model, outcome, rid, started)
                if self._log.take():
                    self._answered(model, outcome, principal, rid, received, response, started, headers)
            except TidegateError as error:
                response = self._refuse(model, error, rid, started, principal, received, headers)
            except Exception:
                response = self._broken(model, rid, started, principal)
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
                lambda contract: oip.decode(body, length, contract),
                rid,
                on_outcome,
            )
        except BaseException:
            if grant is not None:
                grant.cancel()
            raise
        if grant is not None:
            self._grants[id_] = grant
        return id_

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

        def given_back(response: HttpResponse) -> None:
            unpacked.release()
            if id_ is not None:
                self._inflated.pop(id_, None)
            done(response)

        id_ = self.begin(target, rest, unpacked.whole(), given_back, started)
        if id_ is not None:
            self._inflated[id_] = unpacked
        return id_

    def abandon(self, id_: bytes, target: Target, headers: Headers) -> None:
        """The caller has gone."""
        self._core.abandon(id_)
        unpacked = self._inflated.pop(id_, None)
        if unpacked is not None:
            unpacked.release()
        grant = self._grants.pop(id_, None)
        if grant is not None:
            grant.done(failed=True)
        model = target.model
        self._metrics.refused(model, CALLER_GONE)
        gone = TidegateError("the caller closed the connection before the answer", reason=CALLER_GONE)
        rid = telemetry.shown_id(headers.get(b"x-request-id", b""))
        who = self._access.remembered(headers)
        self._log.refused("rest", model, gone, who, rid, status=CLIENT_CLOSED, headers=headers)

    def refuse(self, target: Target, headers: Headers, error: TidegateError) -> HttpResponse:
        """The refusal of a body that has not come, or not all of it."""
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        who = self._access.remembered(headers)
        return self._refuse(target.model, error, rid, time.perf_counter(), who, asked=headers)

    def rejected(self, refusal: Refusal, rid: str) -> None:
        """Log what the connection refused by itself."""
        error = TidegateError(refusal.message, reason=refusal.reason)
        self._log.refused("rest", "", error, None, rid, status=refusal.status)

    def _respond(self, model: str, answer: InferenceResult, rid: bytes, started: float) -> HttpResponse:
        encoding = time.perf_counter()
        body, tail = oip.encode_pieces(
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
        if tail:
            headers.append((_HEADER_LENGTH, b"%d" % len(body)))
        return HttpResponse(200, headers, body, tail)

    def _answered(
        self,
        model: str,
        answer: InferenceResult,
        who: Principal,
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
            who,
            telemetry.shown_id(rid),
            status=200,
            received=received,
            sent=len(response.body) + sum(map(len, response.tail)),
            total=time.perf_counter() - started,
            headers=headers,
        )

    def _refuse(
        self,
        model: str,
        error: TidegateError,
        rid: bytes,
        started: float,
        who: Principal | None = None,
        received: int = 0,
        asked: Headers | None = None,
        protocol: str = "rest",
    ) -> HttpResponse:
        self._metrics.refused(model, error.reason)
        self._log.refused(
            protocol,
            model,
            error,
            who,
            telemetry.shown_id(rid),
            status=status_of(error),
            received=received,
            total=time.perf_counter() - started,
            headers=asked,
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
            headers += [(name.lower().encode(), value.encode()) for name, value in error.told.items()]
        return HttpResponse(status_of(error), headers, body)

    def _broken(self, model: str, rid: bytes, started: float, who: Principal | None) -> HttpResponse:
        log.exception("unexpected error", extra={"request_id": telemetry.shown_id(rid)})
        told = TidegateError("internal error; see the log of the service")
        return self._refuse(model, told, rid, started, who)


def _account(
    grant: Grant, outcome: InferenceResult | TidegateError, received: int, response: HttpResponse
) -> None:
    """The end of an admitted request: what it used is counted, and its caller told what is left."""
    if isinstance(outcome, InferenceResult):
        tokens_in, tokens_out = tokens(outcome.parameters) if outcome.parameters else (0, 0)
        grant.done(
            compute_us=usage_cost.compute_us(outcome.reply),
            received=received,
            sent=len(response.body) + sum(map(len, response.tail)) if response.tail else len(response.body),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            failed=response.status != 200,
        )
    else:
        grant.done(received=received, failed=True)
    response.headers.extend(grant.headers())


def server_timing(answer: InferenceResult, total: float) -> bytes:
    """The ``Server-Timing`` header: durations in milliseconds that add up to ``total``."""
    t = answer.timing
    return (
        b"decode;dur=%.3f, transit;dur=%.3f, wait;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f, total;dur=%.3f"
        % (t.decode * 1e3, t.transit(total) * 1e3, t.wait * 1e3, t.compute * 1e3, t.encode * 1e3, total * 1e3)
    )


def failure_timing(total: float) -> bytes:
    """The same of an answer that is an error: its parts are not known."""
    return b"transit;dur=%.3f, total;dur=%.3f" % (total * 1e3, total * 1e3)


def parse_header_length(headers: Headers) -> int | None:
    """The size of the JSON part when binary data follows it; raises BadRequest."""
    raw = headers.get(_HEADER_LENGTH)
    if raw is None:
        return None
    found = number(raw)
    if found is None:
        shown = raw[:40].decode("latin-1")
        raise BadRequest(f"{oip.HEADER_LENGTH} must be a number of bytes, got {shown!r}")
    return found
