"""Read the answers of a decoupled model. Each request has a separate gRPC stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from tidegate.kernel import tasks
from tidegate.kernel.errors import ModelFailed

# Triton up to 25.01 may crash if a stream is cancelled while Triton sends on it (Triton's issue 8034). One in
# a few hundred cancellations crashed a Triton that sent without a pause. So a stream is cancelled only when
# nothing has arrived for QUIET_S seconds. A stream that never pauses is cancelled after LEAVE_S seconds.
QUIET_S = 0.003
LEAVE_S = 5.0

FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"


class TritonStreams:
    """The streams of one gRPC channel, including abandoned streams that are not cancelled yet."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel the running streams that nobody reads any more."""
        await tasks.end(*self._leaving)

    async def answers(self, request: Any) -> AsyncGenerator[Any]:
        """Send a ``ModelInferRequest``. Yield each ``ModelInferResponse`` when the model sends it.

        Closing the generator cancels the request in Triton. Raises ModelFailed if Triton answers with an
        error, and ``AioRpcError`` if the call fails.
        """
        request.parameters[EMPTY_FINAL].bool_param = True
        call = self._method((request,))
        reading = None
        try:
            while True:
                # Shield the read, because cancelling it would cancel the whole call.
                reading = asyncio.ensure_future(call.read())
                answer = await asyncio.shield(reading)
                if answer is grpc.aio.EOF:
                    return
                if answer.error_message:
                    # The error has no status code. The header triton_grpc_error would add one, but this
                    # client does not send the header. With it, Triton 2.51 crashes if a model marks its error
                    # as the last response.
                    raise ModelFailed(answer.error_message)
                found = answer.infer_response
                final = FINAL in found.parameters and found.parameters[FINAL].bool_param
                if found.outputs or not final:
                    yield found
                if final:
                    return
        finally:
            leaving = asyncio.ensure_future(_leave(call, reading))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)


async def _leave(call: Any, reading: asyncio.Future[Any] | None) -> None:
    """Cancel a call when it pauses for QUIET_S seconds, but after LEAVE_S seconds at the latest.

    If the call ends before that, there is nothing to cancel.
    """
    give_up_at = time.monotonic() + LEAVE_S
    try:
        while reading is not None and time.monotonic() < give_up_at:
            await asyncio.wait({reading}, timeout=QUIET_S)
            if not reading.done():
                return
            if reading.cancelled() or reading.exception() or reading.result() is grpc.aio.EOF:
                return
            reading = asyncio.ensure_future(call.read())
    finally:
        call.cancel()  # no effect if the call has ended
        if reading is not None:
            await asyncio.gather(reading, return_exceptions=True)
