"""Handle ``ModelStreamInfer``: many requests on one call, any number of responses to each.

If a model returns one answer per request, the answers are sent in the order of the requests, as in Triton.
The answers of a decoupled model are sent as soon as the model makes them. The answers to one request stay in
order. If a request fails, its error is sent as a message, and the stream continues.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial
from typing import Any

from services.gateway.api.grpc import codec
from services.gateway.api.grpc.inference import GrpcInference, add_feedback_id, origin_of, timeout_of
from services.gateway.api.grpc.status import details_of
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import new_request_id
from tidegate.kernel.triton_protocol import pb

# The most requests in flight of one stream. While a stream has this many, it accepts no further request.
IN_FLIGHT = 256


class InferenceStream:
    """One ``ModelStreamInfer`` call."""

    def __init__(self, calls: GrpcInference, context: Any) -> None:
        self._calls = calls
        self._context = context
        self._room = asyncio.Semaphore(IN_FLIGHT)
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: asyncio.Task[None] | None = None
        self._credential: dict[bytes, bytes] = context.headers.credential

    async def run(self, requests: Any) -> None:
        """Answer all requests of the stream. If this call is cancelled, cancel the unanswered requests."""
        rid = self._context.rid or new_request_id()
        timeout_of(self._context)  # if the timeout is invalid, this raises and ends the call
        try:
            async for request, held in requests:
                await self._room.acquire()
                self._begin(request, held, rid, timeout_of(self._context))
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()

    def _begin(self, request: Any, held: int, rid: str, timeout_ms: float | None) -> None:
        if self._is_decoupled(request):
            task = asyncio.create_task(self._many(request, rid, timeout_ms))
        else:
            self._last = task = asyncio.create_task(self._one(request, rid, timeout_ms, self._last))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, held))

    def _ended(self, held: int, task: asyncio.Task[None]) -> None:
        self._context.release(held)
        self._tasks.discard(task)
        self._room.release()
        if task is self._last:
            self._last = None

    def _is_decoupled(self, request: Any) -> bool:
        try:
            return self._calls.core.find(request.model_name, request.model_version)[1].decoupled
        except TidegateError:
            return False  # `_one` gets the same error, and reports it in the order of the requests

    async def _one(
        self, request: Any, rid: str, timeout_ms: float | None, before: asyncio.Task[None] | None
    ) -> None:
        """Answer a request with one response. Send it after the response to the previous request."""
        started, principal = time.perf_counter(), None
        headers = self._context.headers.fields
        trace = self._calls.log.begin(rid.encode("latin-1"), headers)
        try:
            # Each request is authenticated, because the key can expire during the stream.
            principal = self._calls.access.authenticate(self._credential)
            response, _ = await self._calls.answer(
                request, principal, rid, timeout_ms, started, headers, trace
            )
            response.parameters[codec.FINAL].bool_param = True
            message = pb.ModelStreamInferResponse(infer_response=response)
        except TidegateError as error:
            failure = self._calls.refused(request, error, rid, principal, started, trace)
            message = self._failure(request, failure)
        except Exception:
            message = self._failure(request, self._calls.internal_error(request, rid, principal, started))
        if before is not None:
            await asyncio.wait([before])
        await self._write(message)

    async def _many(self, request: Any, rid: str, timeout_ms: float | None) -> None:
        """Answer a request with any number of responses. Send each one as soon as the model makes it."""
        started, principal, first = time.perf_counter(), None, None
        grant, cost = None, UsageCost()
        headers = self._context.headers.fields
        trace = self._calls.log.begin(rid.encode("latin-1"), headers)
        try:
            principal = self._calls.access.authenticate(self._credential)
            grant = self._calls.admit(principal, request)
            empty_final = codec.wants_empty_final(request)
            origin = origin_of(request, headers, principal)
            pending = self._calls.feedback_of(request, origin, rid, principal)
            answers = self._calls.core.stream(
                request.model_name,
                request.model_version,
                timeout_ms,
                self._calls.decoder(request, headers, principal),
                trace,
                cost.begin,
                origin,
                principal,
            )
            async with aclosing(answers):
                async for answer in answers:
                    if first is not None:
                        response = self._calls.response(request.model_name, answer)
                    else:  # the metrics count the request once, with the time to its first answer
                        response, _ = self._calls.encode(request.model_name, answer, rid, started)
                        first = answer
                        if pending is not None:
                            add_feedback_id(response, pending, answer)
                    cost.add(answer.reply, answer.parameters, response.ByteSize(), answer.route)
                    response.parameters[codec.FINAL].bool_param = False
                    await self._write(pb.ModelStreamInferResponse(infer_response=response))
            if empty_final:
                response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
                response.parameters[codec.FINAL].bool_param = True
                await self._write(pb.ModelStreamInferResponse(infer_response=response))
            if first is not None and self._calls.log.take():
                parts = {"chunks": cost.answers}
                self._calls.answered(request, first, principal, rid, cost.sent, started, **parts)
            if first is not None:
                self._calls.trace_answer(trace, headers, request, first, started, chunks=cost.answers)
        except TidegateError as error:
            failure = self._calls.refused(request, error, rid, principal, started, trace)
            await self._write(self._failure(request, failure))
        except Exception:
            failure = self._calls.internal_error(request, rid, principal, started)
            await self._write(self._failure(request, failure))
        finally:
            if grant is not None:
                grant.streamed(cost, request.ByteSize())

    async def _write(self, message: Any) -> None:
        async with self._writing:
            await self._context.write(message)

    @staticmethod
    def _failure(request: Any, error: TidegateError) -> Any:
        response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        return pb.ModelStreamInferResponse(error_message=details_of(error), infer_response=response)
