"""Count a stream's answers, and log the request at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from services.gateway.api.inference.handler import CLIENT_CLOSED
from services.gateway.api.metrics import CALLER_GONE, GatewayMetrics, http_status
from services.gateway.application.access_log import AccessLog, Headers, LoggedAnswer
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.service import caller

A = TypeVar("A", bound=LoggedAnswer)


class StreamObserver:
    """An observer that counts and logs the streams of one API.

    ``protocol``: the API's name in the log.
    """

    def __init__(self, protocol: str, metrics: GatewayMetrics, log: AccessLog) -> None:
        self._protocol = protocol
        self._metrics = metrics
        self._log = log

    async def watch(
        self,
        model: str,
        started: float,
        received: int,
        cost: UsageCost,
        answers: AsyncGenerator[A],
        *,
        trace: bytes = b"",
        headers: Headers | None = None,
    ) -> AsyncGenerator[A]:
        """Yield a request's answers unchanged, count them, and log the request at its end.

        ``started``: when the request began (``time.perf_counter``). ``received``: the size of the body in
        bytes. ``cost``: the request's usage, which grows until the end. ``trace``: the trace field of the
        request's frame.
        """
        first: A | None = None
        principal, rid = caller.current.get().principal, telemetry.request_id.get()
        error: TidegateError | None = None
        try:
            async with aclosing(self._metrics.watch(model, started, answers)) as counted:
                async for answer in counted:
                    first = first or answer
                    yield answer
        except TidegateError as failure:
            error = failure
            raise
        except (GeneratorExit, asyncio.CancelledError):
            error = TidegateError("the caller closed the connection", reason=CALLER_GONE)
            raise
        finally:
            if error is not None:
                self._log.refused(
                    self._protocol, model, error, principal, rid,
                    status=_status(error), received=received, started=started, chunks=cost.answers,
                    headers=headers, trace=trace,
                )  # fmt: skip
            elif first is not None and self._log.take():
                self._log.answered(
                    self._protocol, model, first, principal, rid,
                    status=200, received=received, total=time.perf_counter() - started, chunks=cost.answers,
                    sent=cost.sent, headers=headers,
                )  # fmt: skip
            if error is None and first is not None and self._log.traces is not None:
                self._log.trace_answer(
                    trace, headers, self._protocol, model, first,
                    status=200, started=started, chunks=cost.answers,
                )  # fmt: skip


def _status(error: TidegateError) -> int:
    if error.reason == CALLER_GONE:
        return CLIENT_CLOSED
    return http_status(error)
