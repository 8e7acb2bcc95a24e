"""The answers of one request to a decoupled model, over a gRPC stream of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from tidegate.kernel import tasks
from tidegate.kernel.errors import ModelFailed

# Triton up to 25.01 may crash when a stream is cancelled while it sends (its issue 8034; met at one cancel in
# a few hundred of streams that send without a pause). So a stream is cancelled at a quiet moment: when
# nothing has come for QUIET_S, or after LEAVE_S without one.
QUIET_S = 0.003
LEAVE_S = 5.0

FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"


class TritonStreams:
    """The streams of one channel, with those that their callers have left but that have not ended yet."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the streams that their callers have left."""
        await tasks.end(*self._leaving)

    async def answers(self, request: Any) -> AsyncGenerator[Any]:
        """Yield the ``ModelInferResponse``s to a ``ModelInferRequest`` as the model sends them.

        Closing the generator cancels the request in Triton. Raises ModelFailed and ``AioRpcError``.
        """
        request.parameters[EMPTY_FINAL].bool_param = True
        call = self._method((request,))
        reading = None
        try:
            while True:
                # A shielded task, because cancelling a read cancels the whole call.
                reading = asyncio.ensure_future(call.read())
                answer = await asyncio.shield(reading)
                if answer is grpc.aio.EOF:
                    return
                if answer.error_message:
                    # There is no status code. Triton would send one with the header triton_grpc_error, but
                    # then Triton 2.51 crashes if a model that sent an error marks it as the last response.
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
    """Wait for the end of a call, and cancel it if it does not end by itself."""
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
        call.cancel()  # does nothing if the call has ended
        if reading is not None:
            await asyncio.gather(reading, return_exceptions=True)
