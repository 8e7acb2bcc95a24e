"""The access log: JSON lines for failed requests, and for a sample of the successful ones.

If too many requests fail in a second, only some of them get a line. The event loop collects lines, and a
thread writes them a few times a second. A request that is not logged costs only one function call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson

from services.gateway.application.inference.core import Timing
from services.gateway.application.request_traces import RequestTraces
from services.gateway.domain.contract import Decoded
from services.gateway.domain.log_sampling import LogSampler, trace_id
from services.gateway.domain.routing import DeploymentRoute
from services.gateway.settings import GatewaySettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.rotating_file import RotatingFile
from tidegate.kernel.token_bucket import TokenBucket

log = telemetry.logger(__name__)

WRITE_S = 0.2
# The largest number of lines in memory. Above it, new lines are dropped, because the disk cannot keep up.
MAX_PENDING = 20_000
MAX_PROBLEM_CHARS = 500

Headers = Mapping[bytes, bytes]
Write = Callable[[bytes], None]


class LoggedAnswer(Protocol):
    """The parts of a model's answer that the log and the metrics use."""

    @property
    def route(self) -> DeploymentRoute:
        """The Deployment that answered."""

    @property
    def request(self) -> Decoded:
        """The request."""

    @property
    def timing(self) -> Timing:
        """The parts of the request's time."""


class AccessLog:
    """A log of requests.

    A thread calls ``write`` with whole lines. If ``write`` is None, nothing is logged. ``traces`` exports the
    traces of the same requests; None: no traces are exported.
    """

    def __init__(
        self,
        write: Write | None,
        *,
        first: int,
        fraction: float,
        errors_per_s: int,
        traces: RequestTraces | None = None,
    ) -> None:
        self._write = write
        self.traces = traces
        self._sampler = LogSampler(first, fraction) if write is not None else LogSampler(0, 0)
        self._errors = TokenBucket(errors_per_s, errors_per_s * 10)
        self._lines: list[dict[str, Any]] = []
        self._task: asyncio.Task[None] | None = None
        self.take = self._sampler.take

    @classmethod
    def off(cls) -> AccessLog:
        """Return an access log that logs nothing."""
        return cls(None, first=0, fraction=0, errors_per_s=1)

    def begin(self, rid: bytes, headers: Headers) -> bytes:
        """Return the field ``trace`` of a request's frame.

        It is the request's id. If the request is traced, its trace context follows.
        """
        return rid if self.traces is None else self.traces.begin(rid, headers)

    def start(self) -> None:
        """Start writing lines in the background."""
        if self._write is not None:
            self._task = asyncio.create_task(self._run(), name="access log")

    async def stop(self) -> None:
        """Write the remaining lines, and stop."""
        await tasks.end(self._task)
        await self._flush()

    def answered(
        self,
        protocol: str,
        model: str,
        answer: LoggedAnswer,
        principal: Principal | None,
        rid: str,
        *,
        status: int | str,
        received: int,
        sent: int,
        total: float,
        headers: Headers | None = None,
        **extra: Any,
    ) -> None:
        """Log an answered request. Call this only if :meth:`take` returned True. Times are in seconds."""
        t = answer.timing
        self._note(
            {
                "level": "info",
                "request_id": rid,
                "protocol": protocol,
                "model": model,
                "version": answer.route.version,
                "deployment": answer.route.name,
                "status": status,
                "received": received,
                "sent": sent,
                "total_ms": _ms(total),
                "decode_ms": _ms(t.decode),
                "transit_ms": _ms(t.transit(total)),
                "wait_ms": _ms(t.wait),
                "compute_ms": _ms(t.compute),
                "encode_ms": _ms(t.encode),
            },
            principal,
            answer.request.id,
            headers,
            extra,
        )

    def trace_answer(
        self,
        trace: bytes,
        headers: Headers | None,
        protocol: str,
        model: str,
        answer: LoggedAnswer,
        *,
        status: int | str,
        started: float,
        **extra: Any,
    ) -> None:
        """Export the trace of an answered request, if the request was chosen for tracing or was slow.

        Of the slow requests that were not chosen, only a limited number per second is exported.
        :attr:`traces` must not be None. ``started``: the time of ``time.perf_counter`` at which the request
        began.
        """
        assert self.traces is not None
        total = time.perf_counter() - started
        if not self.traces.wants(trace, total):
            return
        route = answer.route
        about = {
            **_about(trace, protocol, model, status),
            "tidegate.deployment": route.name,
            "tidegate.version": route.version,
            "tidegate.rows": answer.request.rows,
            **{f"tidegate.{name}": value for name, value in extra.items()},
        }
        self.traces.ended(
            trace, headers, f"{protocol} {model}", started, total, about,
            deployment=route.name, timing=answer.timing,
        )  # fmt: skip

    def trace_job(
        self,
        trace: bytes,
        headers: Headers,
        model: str,
        deployment: str,
        job: str,
        *,
        status: int,
        started: float,
    ) -> None:
        """Export the trace of an accepted job.

        The trace is exported only if the request was chosen for tracing, or if accepting the job took long.
        """
        if self.traces is None:
            return
        total = time.perf_counter() - started
        if self.traces.wants(trace, total):
            about = _about(trace, "job", model, status) | {
                "tidegate.deployment": deployment,
                "tidegate.job": job,
            }
            self.traces.ended(trace, headers, f"job {model}", started, total, about, deployment=deployment)

    def accepted(
        self, model: str, deployment: str, version: str, job: str, principal: Principal, rid: str,
        *, status: int, received: int, sent: int, total: float, headers: Headers | None = None,
    ) -> None:  # fmt: skip
        """Log an accepted job. Call this only if :meth:`take` returned True."""
        self._note(
            {
                "level": "info",
                "request_id": rid,
                "job": job,
                "protocol": "job",
                "model": model,
                "version": version,
                "deployment": deployment,
                "status": status,
                "received": received,
                "sent": sent,
                "total_ms": _ms(total),
            },
            principal,
            None,
            headers,
            {},
        )

    def refused(
        self,
        protocol: str,
        model: str,
        error: TidegateError,
        principal: Principal | None,
        rid: str,
        *,
        status: int | str,
        received: int = 0,
        started: float | None = None,
        headers: Headers | None = None,
        trace: bytes = b"",
        **extra: Any,
    ) -> None:
        """Log a failed or refused request, and export its trace. Both are limited in number per second.

        If more requests fail in a second than the log's ``errors_per_s`` allows, the other failed requests
        get no line and are only counted. The trace of a request that was chosen for tracing is always
        exported. ``started``: the time of ``time.perf_counter`` at which the request began; None means now.
        """
        ended = time.perf_counter()
        started = ended if started is None else started
        total = ended - started
        if self.traces is not None and self.traces.wants(trace, total, error):
            about = _about(trace or rid.encode("latin-1", "replace"), protocol, model, status)
            name = f"{protocol} {model[:200]}"
            self.traces.ended(
                trace, headers, name, started, total, about, deployment=error.deployment, error=error
            )
        now = time.monotonic()
        if self._write is None or not self._errors.take(now):
            return
        self._note(
            {
                "level": "warning",
                "request_id": rid,
                "protocol": protocol,
                "model": model[:200],
                "deployment": error.deployment,
                "status": status,
                "reason": error.reason,
                "problem": error.message[:MAX_PROBLEM_CHARS],
                "received": received,
                "total_ms": _ms(total),
            },
            principal,
            None,
            headers,
            extra,
        )

    def _note(
        self,
        line: dict[str, Any],
        principal: Principal | None,
        client_id: str | None,
        headers: Headers | None,
        extra: dict[str, Any],
    ) -> None:
        if len(self._lines) >= MAX_PENDING:
            self._errors.dropped += 1
            return
        line["request_id"] = line["request_id"][: telemetry.LONGEST_ID]
        if principal is not None and principal is not ANONYMOUS:
            line["caller"], line["tenant"] = principal.id, principal.name
        if client_id:
            line["client_id"] = client_id[: telemetry.LONGEST_ID]
        if headers is not None and (trace := trace_id(headers.get(b"traceparent"))):
            line["trace_id"] = trace
        if extra:
            line |= extra
        line["at"] = time.time()
        self._lines.append(line)

    async def _run(self) -> None:
        second = time.monotonic()
        while True:
            await asyncio.sleep(WRITE_S)
            now = time.monotonic()
            if now - second >= 1.0:
                second = now
                self._sampler.second()
            await self._flush()

    async def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if dropped := self._errors.settled():
            message = (
                f"{dropped} lines were dropped, because more requests failed than "
                "TIDEGATE_ACCESS_LOG_ERRORS_PER_S allows"
            )
            lines.append({"at": time.time(), "level": "warning", "message": message, "dropped": dropped})
        if lines and self._write is not None:
            try:
                await asyncio.to_thread(self._write_all, lines)
            except OSError as error:
                log.warning("the access log could not be written", extra={"problem": str(error)})

    def _write_all(self, lines: list[dict[str, Any]]) -> None:
        assert self._write is not None
        self._write(b"".join(map(_encoded, lines)))


def _about(trace: bytes, protocol: str, model: str, status: int | str) -> dict[str, str | int]:
    return {
        "tidegate.protocol": protocol,
        "tidegate.model": model[:200],
        "tidegate.request_id": telemetry.shown_id(trace),
        "http.response.status_code" if isinstance(status, int) else "rpc.response.status_code": status,
    }


def _encoded(line: dict[str, Any]) -> bytes:
    when = datetime.fromtimestamp(line.pop("at"), UTC).isoformat(timespec="milliseconds")
    head = {"time": when, "level": line.pop("level"), "service": "gateway", "logger": "access"}
    return orjson.dumps(head | {"message": "request"} | line) + b"\n"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def access_log_of(settings: GatewaySettings, traces: RequestTraces | None = None) -> AccessLog:
    """Return the access log for these settings."""
    write: Write | None = None
    if settings.access_log == "file":
        path = settings.state_path / "log" / "access.log"
        file = RotatingFile(path, settings.access_log_mb * 2**20, settings.access_log_days * 86_400)
        write = file.append
    elif settings.access_log == "stdout":
        write = _to_stdout
    return AccessLog(
        write,
        first=settings.access_log_first_per_s,
        fraction=settings.access_log_sample,
        errors_per_s=settings.access_log_errors_per_s,
        traces=traces,
    )


def _to_stdout(lines: bytes) -> None:
    # This runs in a thread. The buffer of sys.stdout may be in use by another thread, so write without it.
    with contextlib.suppress(BlockingIOError):
        view = memoryview(lines)
        while view:
            view = view[os.write(sys.__stdout__.fileno(), view) :]  # type: ignore[union-attr]
