"""Send each answer of a decoupled model to the gateway immediately, as a CHUNK."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from services.worker.adapters.metrics import CHUNKS, FIRST_CHUNK_SECONDS
from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.reply_publisher import GatewayGone
from services.worker.application.model_calls import MAX_US, CallFailure, check_key_length, decide_failure
from services.worker.domain.backlog import QueuedRequest
from services.worker.domain.split import describe
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply

# A stream ends if this many seconds pass without an answer. If the caller's timeout is longer, that timeout
# is the limit. Usually the gateway cancels the stream sooner.
SILENCE_S = 600.0
_NO_FACTS: Mapping[str, Any] = {}


class Replies(Protocol):
    """Sends replies to gateway processes, in the order in which :meth:`send_chunks` is called."""

    async def send_chunks(self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float) -> None:
        """Send replies to one gateway process, and wait until the next reply may follow.

        Raises GatewayGone if the gateway process has ended.
        """


async def send_answers(
    replies: Replies,
    model: Model,
    item: QueuedRequest,
    began: float,
    *,
    first_facts: Mapping[str, Any] = _NO_FACTS,
    see: Callable[[ModelAnswer], None] | None = None,
) -> tuple[int, str | CallFailure[QueuedRequest]]:
    """Send each answer of a stream immediately. Return the number of sent answers, and the outcome.

    The outcome is "ok", "expired" or "cancelled", or the failure of the call. It is "cancelled" if the
    gateway process has ended.

    ``began``: the start of the stream, in seconds of the worker's monotonic clock. ``first_facts``:
    parameters to add to the first answer. ``see`` is called with each sent answer.
    """
    loop = asyncio.get_running_loop()
    left_s = max(item.request.deadline_ms / 1e3 - time.time(), 0.001)
    silence_s = max(left_s, SILENCE_S)
    chunks, last = 0, began
    try:
        async with asyncio.timeout(left_s) as limit, aclosing(model.stream(item.request)) as answers:
            async for answer in answers:
                now = time.monotonic()
                limit.reschedule(loop.time() + silence_s)
                if chunks == 0 and first_facts:
                    answer = ModelAnswer(answer.outputs, {**answer.parameters, **first_facts})
                chunk = _chunk(item, answer, chunks, began - item.received, now - last)
                await replies.send_chunks(item.delivery.reply_to, [chunk], left_s=silence_s)
                if chunks == 0:
                    FIRST_CHUNK_SECONDS.observe(now - began)
                if see is not None:
                    see(answer)
                chunks, last = chunks + 1, now
                CHUNKS.inc()
    except TimeoutError:
        return chunks, "expired"
    except GatewayGone:
        return chunks, "cancelled"
    except Exception as error:
        return chunks, decide_failure([item], error, "the stream failed")
    return chunks, "ok"


def _chunk(
    item: QueuedRequest, answer: ModelAnswer, seq: int, waited_s: float, made_s: float
) -> Buffer | Reply:
    """Return an answer as a CHUNK: a frame, or a Reply if it is large.

    Raises ModelFailed if the answer's key is too long for a frame.
    """
    request = item.request
    rows, tensors = describe(answer.outputs, request.rows)
    data: list[Buffer] = [output.raw for output in answer.outputs]
    wait_us, compute_us = (min(int(s * 1e6), MAX_US) for s in (waited_s, made_s))
    key = envelope.result_key(tensors, answer.parameters)
    check_key_length(len(key))
    reply = Reply(request.id, envelope.CHUNK, request.attempt, seq, rows, wait_us, compute_us, 1, key, data)
    if sum(map(len, data)) > envelope.LARGE:
        return reply
    return b"".join(envelope.reply_pieces(reply))
