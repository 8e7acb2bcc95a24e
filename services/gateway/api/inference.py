"""One inference call over HTTP, whichever way its bytes come: headers and body in, a response out."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import orjson

from services.gateway.api.compression import Response, deliver
from services.gateway.api.limits import Headers, Limits
from services.gateway.api.metrics import Metrics
from services.gateway.core import Answer, Core, parse_timeout
from tidegate import telemetry
from tidegate.errors import BadRequest, Forbidden, PayloadTooLarge, TidegateError
from tidegate.protocol import oip
from tidegate.protocol.classification import Labels
from tidegate.protocol.envelope import Buffer
from tidegate.service import error_body, is_local, new_request_id, status_of

log = telemetry.logger(__name__)

PREFIX, SUFFIX = "/v2/models/", "/infer"
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


class Inference:
    """Decode, hand to the core, encode. Every way to fail becomes a response in the protocol's shape."""

    def __init__(
        self,
        core: Core,
        *,
        limits: Limits,
        local_only: bool,
        metrics: Metrics,
        labels: Callable[[str], Labels] = lambda _: {},
    ) -> None:
        self._core = core
        self._labels = labels
        self._local_only = local_only
        self._metrics = metrics
        self._inflated: dict[bytes, int] = {}
        self.limits = limits

    @staticmethod
    def target(method: str, path: str) -> str | None:
        """The ``{model}[/versions/{v}]`` of an inference call; None for any other request."""
        if method == "POST" and path.startswith(PREFIX) and path.endswith(SUFFIX):
            return path[len(PREFIX) : -len(SUFFIX)]
        return None

    def begin(
        self, target: str, headers: Headers, body: Buffer, done: Callable[[Response], None]
    ) -> bytes | None:
        """Start the call; gives the id of what is under way, or None when ``done`` was called already.

        Nobody may change ``body`` any more: its tensors are sent from where they are.
        """
        started = time.perf_counter()
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        model, _, version = target.partition("/versions/")

        def on_outcome(outcome: Answer | TidegateError) -> None:
            if isinstance(outcome, TidegateError):
                done(self._refuse(model, outcome, rid))
                return
            try:
                response = self._respond(model, outcome, rid, started)
            except TidegateError as error:
                response = self._refuse(model, error, rid)
            except Exception:
                response = self._broken(model, rid)
            if b"accept-encoding" in headers:
                deliver(response, headers, done)
            else:
                done(response)

        try:
            if self._local_only and not is_local(headers):
                raise Forbidden("this address answers only to local callers: foreign Host or Origin header")
            if b"content-encoding" in headers:
                return self._begin_compressed(target, headers, body, done)
            length = parse_header_length(headers)
            self.limits.check_json(len(body) if length is None else length)
            timeout_ms = parse_timeout(headers.get(b"x-request-timeout-ms"))
            return self._core.begin(
                model,
                version,
                timeout_ms,
                lambda contract: oip.decode(body, length, contract),
                rid,
                on_outcome,
            )
        except TidegateError as error:
            done(self._refuse(model, error, rid))
        except Exception:
            done(self._broken(model, rid))
        return None

    def _begin_compressed(
        self, target: str, headers: Headers, body: Buffer, done: Callable[[Response], None]
    ) -> bytes | None:
        plain = decompress(body, headers, self.limits.body_bytes)
        if not self.limits.bodies.take(len(plain)):
            raise self.limits.overloaded()
        held = len(plain)

        def given_back(response: Response) -> None:
            self.limits.bodies.give(held)
            if id_ is not None:
                self._inflated.pop(id_, None)
            done(response)

        id_: bytes | None = None
        rest = {name: value for name, value in headers.items() if name != b"content-encoding"}
        id_ = self.begin(target, rest, plain, given_back)
        if id_ is not None:
            self._inflated[id_] = held
        return id_

    def abandon(self, id_: bytes, target: str) -> None:
        """The caller has gone."""
        self._core.dispatcher.abandon(id_)
        self.limits.bodies.give(self._inflated.pop(id_, 0))
        self._metrics.refused(target.partition("/versions/")[0], "caller_gone")

    def refuse(self, target: str, headers: Headers, error: TidegateError) -> Response:
        """The refusal of a body that has not come, or not all of it."""
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        return self._refuse(target.partition("/versions/")[0], error, rid)

    def _respond(self, model: str, answer: Answer, rid: bytes, started: float) -> Response:
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
        return Response(200, headers, body, tail)

    def _refuse(self, model: str, error: TidegateError, rid: bytes) -> Response:
        self._metrics.refused(model, error.reason)
        body = orjson.dumps(error_body(error.message, error.reason, rid.decode("latin-1")))
        headers = [_JSON, (b"content-length", b"%d" % len(body)), (b"x-request-id", rid)]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, int(-(-error.retry_after_s // 1)))))
        return Response(status_of(error), headers, body)

    def _broken(self, model: str, rid: bytes) -> Response:
        log.exception("unexpected error", extra={"request_id": rid.decode("latin-1")})
        return self._refuse(model, TidegateError("something went wrong here; the log has it"), rid)


def server_timing(answer: Answer, total: float) -> bytes:
    """The ``Server-Timing`` header: durations in milliseconds that add up to ``total``."""
    t = answer.timing
    return (
        b"decode;dur=%.3f, transit;dur=%.3f, wait;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f, total;dur=%.3f"
        % (t.decode * 1e3, t.transit(total) * 1e3, t.wait * 1e3, t.compute * 1e3, t.encode * 1e3, total * 1e3)
    )


def parse_header_length(headers: Headers) -> int | None:
    """The size of the JSON part when binary data follows it; raises BadRequest."""
    raw = headers.get(_HEADER_LENGTH)
    if raw is None:
        return None
    if not raw.isdigit():
        raise BadRequest(f"{oip.HEADER_LENGTH} must be a number of bytes, got {raw.decode('latin-1')!r}")
    return int(raw)


def decompress(body: Buffer, headers: Headers, limit: int) -> Buffer:
    """Undo ``Content-Encoding`` gzip or deflate up to ``limit`` bytes: BadRequest, PayloadTooLarge."""
    encoding = headers.get(b"content-encoding", b"").lower()
    if encoding in {b"", b"identity"}:
        return body
    if encoding not in {b"gzip", b"deflate"}:
        raise BadRequest(
            f"Content-Encoding {encoding.decode('latin-1')!r} is not known; gzip and deflate are"
        )
    try:
        inflater = zlib.decompressobj(wbits=31 if encoding == b"gzip" else 15)
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is not {encoding.decode()}: {error}") from None
    if len(plain) > limit:
        raise PayloadTooLarge(f"the decompressed body is larger than {limit} bytes")
    if not inflater.eof:
        raise BadRequest(f"the body's {encoding.decode()} data is cut off")
    return plain
