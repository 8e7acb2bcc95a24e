"""The hot path: ``POST /v2/models/{model}[/versions/{v}]/infer`` as plain ASGI.

It stands in front of the FastAPI app, which has everything else: for these calls the framework's layers
would cost more than the broker does.
"""

from __future__ import annotations

import time
import zlib

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api.metrics import Metrics
from services.gateway.core import Answer, Core, parse_timeout
from tidegate import telemetry
from tidegate.errors import BadRequest, Forbidden, PayloadTooLarge, TidegateError
from tidegate.protocol import oip
from tidegate.service import error_body, is_local, new_request_id, status_of

log = telemetry.logger(__name__)

PREFIX, SUFFIX = "/v2/models/", "/infer"
_HEADER_LENGTH = oip.HEADER_LENGTH.lower().encode()
Headers = dict[bytes, bytes]


class CallerGone(Exception):
    """The client closed the connection before its request was complete."""


class InferDoor:
    """Decode, call the core, encode."""

    def __init__(
        self, app: ASGIApp, core: Core, *, max_body_bytes: int, local_only: bool, metrics: Metrics
    ) -> None:
        self._app = app
        self._core = core
        self._max_body_bytes = max_body_bytes
        self._local_only = local_only
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            if path.startswith(PREFIX) and path.endswith(SUFFIX):
                await self._infer(path[len(PREFIX) : -len(SUFFIX)], scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _infer(self, target: str, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers: Headers = dict(scope["headers"])
        rid = headers.get(b"x-request-id") or new_request_id().encode()
        model = target
        try:
            if self._local_only and not is_local(headers):
                raise Forbidden("this address answers only to local callers: foreign Host or Origin header")
            model, _, version = target.partition("/versions/")
            body = decompress(await self._read(headers, receive), headers, self._max_body_bytes)
            length = parse_header_length(headers)
            answer = await self._core.infer(
                model,
                version,
                parse_timeout(headers.get(b"x-request-timeout-ms")),
                lambda contract: oip.decode(body, length, contract),
                rid,
            )
            await self._respond(model, answer, rid, started, send)
        except CallerGone:
            self._metrics.refused(model, "caller_gone")
        except TidegateError as error:
            await self._refuse(model, error, rid, send)
        except Exception:
            log.exception("unexpected error", extra={"request_id": rid.decode("latin-1")})
            await self._refuse(model, TidegateError("something went wrong here; the log has it"), rid, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        message = await receive()
        if not message.get("more_body"):
            return self._chunk(message)
        chunks, size = [self._chunk(message)], len(message["body"])
        while message.get("more_body"):
            message = await receive()
            chunks.append(self._chunk(message))
            size += len(chunks[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
        return b"".join(chunks)

    @staticmethod
    def _chunk(message: Message) -> bytes:
        if message["type"] == "http.disconnect":
            raise CallerGone
        chunk: bytes = message.get("body", b"")
        return chunk

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._max_body_bytes} bytes")

    async def _respond(self, model: str, answer: Answer, rid: bytes, started: float, send: Send) -> None:
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
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", rid),
            (b"server-timing", server_timing(answer, total)),
        ]
        if head_length is None:
            headers.append((b"content-type", b"application/json"))
        else:
            headers.append((b"content-type", b"application/octet-stream"))
            headers.append((_HEADER_LENGTH, b"%d" % head_length))
        self._metrics.answered(model, answer.route.name, timing, total)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _refuse(self, model: str, error: TidegateError, rid: bytes, send: Send) -> None:
        body = orjson.dumps(error_body(error.message, error.reason, rid.decode("latin-1")))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", rid),
        ]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, int(-(-error.retry_after_s // 1)))))
        self._metrics.refused(model, error.reason)
        await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
        await send({"type": "http.response.body", "body": body})


def server_timing(answer: Answer, total: float) -> bytes:
    """The ``Server-Timing`` header: durations in milliseconds that add up to ``total``."""
    t = answer.timing
    return (
        b"decode;dur=%.3f, transit;dur=%.3f, wait;dur=%.3f, "
        b"compute;dur=%.3f, encode;dur=%.3f, total;dur=%.3f"
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
