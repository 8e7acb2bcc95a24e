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
    """The streams of one channel, among them those that their callers have left and that are not over yet."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End at once what was left."""
        await tasks.end(*self._leaving)

    async def answers(self, request: Any) -> AsyncGenerator[Any]:
        """The ``ModelInferResponse``s to a ``ModelInferRequest``, each as it is made.

        Closing the generator cancels the request in Triton. Raises ModelFailed and ``AioRpcError``.
        """
        request.parameters[EMPTY_FINAL].bool_param = True
        call = self._method((request,))
        reading = None
        try:
            while True:
                # A task: cancelling a read would cancel the call, at whatever moment.
                reading = asyncio.ensure_future(call.read())
                answer = await asyncio.shield(reading)
                if answer is grpc.aio.EOF:
                    return
                if answer.error_message:
                    # Words only. With the header triton_grpc_error there would be a status code, and Triton
                    # 2.51 crashes when a model that sent an error then says that this was its last response.
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
    """See a call to its end: it ends by itself, or is cancelled."""
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
        call.cancel()  # no more than a word when it has ended
        if reading is not None:
            await asyncio.gather(reading, return_exceptions=True)
