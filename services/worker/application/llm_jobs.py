"""Runs the request of a job on a language model, and waits while the engine is busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import orjson

from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.domain.llm_answers import (
    Collected,
    NotOneEvent,
    collected,
    refusal,
    retry_pause_s,
)
from services.worker.domain.upstream_wait import pause_of_llm
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, DeadlinePassed, TidegateError
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.llm import EVENTS, META

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class LlmAnswer:
    """The answer to a job's request.

    ``refusal``: the error for the job's record if the engine refused the request; None otherwise.
    """

    answer: ModelAnswer
    refusal: TidegateError | None


async def llm_answer(
    model: Model,
    request: Request,
    timeout_s: float,
    upstream_wait_s: float = 0.0,
    wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> LlmAnswer:
    """Return the answer of a language model to a request that does not stream.

    If the engine or its provider is busy (429 or 503), try again until ``timeout_s`` has passed. If the
    upstream does not answer (502 or 504), try again for at most ``upstream_wait_s`` seconds.
    ``wait(seconds)`` is called before each retry. Raises DeadlinePassed, and the errors of
    :meth:`Model.stream`. If the task that runs this function is cancelled, the engine's request is cancelled
    too.
    """
    try:
        async with asyncio.timeout(timeout_s):
            tries, began = 0, time.monotonic()
            while True:
                found = await _collect(model, request)
                pause_s = retry_pause_s(found.meta, tries)
                if pause_s is None:
                    pause_s = pause_of_llm(found.meta, time.monotonic() - began, upstream_wait_s)
                if pause_s is None:
                    return LlmAnswer(_as_answer(found), refusal(found))
                if tries == 0:
                    status = found.meta.status
                    log.info("a job waits for its engine", extra={"status": status, "pause_s": pause_s})
                await wait(pause_s)
                tries += 1
    except TimeoutError:
        raise DeadlinePassed("the job expired before the model answered") from None


async def _collect(model: Model, request: Request) -> Collected:
    answers = []
    async with aclosing(model.stream(request)) as stream:
        async for answer in stream:
            outputs = {output.name: output.raw for output in answer.outputs}
            if EVENTS not in outputs or META not in outputs:
                raise BadRequest(
                    "This model is decoupled: it may return any number of answers to a request. A job can "
                    "have only one answer. Use /generate_stream"
                )
            answers.append((outputs[EVENTS], outputs[META]))
    try:
        return collected(answers)
    except (NotOneEvent, orjson.JSONDecodeError) as error:
        raise BadRequest(f"the engine's answer is not one JSON document: {error}") from None


def _as_answer(found: Collected) -> ModelAnswer:
    return ModelAnswer(found.outputs(), found.parameters())
