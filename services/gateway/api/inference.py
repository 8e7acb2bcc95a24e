"""One inference call over HTTP, whichever way its bytes come: headers and body in, a response out."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import orjson

from services.gateway.api.metrics import Metrics
from services.gateway.core import Answer, Core, parse_timeout
from tidegate import telemetry
from tidegate.errors import BadRequest, Forbidden, PayloadTooLarge, TidegateError
from tidegate.protocol import oip
from tidegate.service import error_body, is_local, new_request_id, status_of

log = telemetry.logger(__name__)

PREFIX, SUFFIX = "/v2/models/", "/infer"
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
Headers = dict[bytes, bytes]


class Response(NamedTuple):
    """What goes back: status code, headers (names in lower case) and body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Inference:
    """Decode, hand to the core, encode. Every way to fail becomes a response in the protocol's shape."""

    def __init__(self, core: Core, *, max_body_bytes: int, local_only: bool, metrics: Metrics) -> None:
        self._core = core
        self._local_only = local_only
        self._metrics = metrics
        self.max_body_bytes = max_body_bytes

    @staticmethod
    def target(method: str, path: str) -> str | None:
        """The ``{model}[/versions/{v}]`` of an inference call; None for any other request."""
        if method == "POST" and path.startswith(PREFIX) and path.endswith(SUFFIX):
            return path[len(PREFIX) : -len(SUFFIX)]
        return None

    def begin(
        self, target: str, headers: Headers, body: bytes, done: Callable[[Response], None]
    ) -> bytes | None:
        """Start the call; gives the id of what is under way, or None when ``done`` was called already."""
        started = time.perf_counter()
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        model, _, version = target.partition("/versions/")

        def on_outcome(outcome: Answer | TidegateError) -> None:
            if isinstance(outcome, TidegateError):
                done(self._refuse(model, outcome, rid))
                return
            try:
                response = self._respond(model, outcome, rid, started)
            except Exception:
                response = self._broken(model, rid)
            done(response)

        try:
            if self._local_only and not is_local(headers):
                raise Forbidden("this address answers only to local callers: foreign Host or Origin header")
            plain = decompress(body, headers, self.max_body_bytes)
            length = parse_header_length(headers)
            timeout_ms = parse_timeout(headers.get(b"x-request-timeout-ms"))
            return self._core.begin(
                model,
                version,
                timeout_ms,
                lambda contract: oip.decode(plain, length, contract),
                rid,
                on_outcome,
            )
        except TidegateError as error:
            done(self._refuse(model, error, rid))
        except Exception:
            done(self._broken(model, rid))
        return None

    def abandon(self, id_: bytes, target: str) -> None:
        """The caller has gone."""
        self._core.dispatcher.abandon(id_)
        self._metrics.refused(target.partition("/versions/")[0], "caller_gone")

    def too_large(self, target: str, headers: Headers) -> Response:
        """The refusal of a body over the limit, while it streams in."""
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        error = PayloadTooLarge(f"the body is larger than {self.max_body_bytes} bytes")
        return self._refuse(target.partition("/versions/")[0], error, rid)

    def _respond(self, model: str, answer: Answer, rid: bytes, started: float) -> Response:
        encoding = time.perf_counter()
        body, head_length = oip.encode(
            model,
            answer.route.version,
            answer.request,
            answer.rows,
            answer.outputs,
            answer.parameters,
            answer.reply.data,
        )
        now = time.perf_counter()
        timing, total = answer.timing, now - started
        timing.encode = now - encoding
        self._metrics.answered(model, answer.route.name, timing, total)
        headers = [
            _JSON if head_length is None else _BINARY,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", rid),
            (b"server-timing", server_timing(answer, total)),
        ]
        if head_length is not None:
            headers.append((_HEADER_LENGTH, b"%d" % head_length))
        return Response(200, headers, body)

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


def decompress(body: bytes, headers: Headers, limit: int) -> bytes:
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
    return plain
