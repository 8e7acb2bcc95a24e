"""What the calls of requests and of jobs have in common: their answers, and what is measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from services.worker.adapters.metrics import CALL_SECONDS, CALL_SIZE
from services.worker.adapters.model_call import ModelAnswer
from services.worker.domain.split import describe, split, split_parameters
from services.worker.domain.statistics import WorkStats
from tidegate.kernel.errors import ModelFailed, TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Request, Tensor

# Where a frame counts microseconds.
MOST_US = 2**32 - 1


class Waited(Protocol):
    """A request in hand; ``received`` is on the worker's monotonic clock, in seconds."""

    request: Request
    received: float


def answers(
    group: Sequence[Waited], answer: ModelAnswer, started: float, spent: float
) -> list[bytes | Reply]:
    """Return a reply for each request, framed unless it is large.

    Raises Mismatch when the answer cannot be divided, ModelFailed when its parameters are too long.
    """
    outputs = answer.outputs
    rows = sum(item.request.rows for item in group)
    answer_rows, tensors = describe(outputs, rows)
    if len(group) == 1:
        parts = [[output.raw for output in outputs]]
    else:
        parts = split(outputs, [item.request.rows for item in group])
    keys = _keys(group, tensors, answer.parameters)
    compute_us, shared = min(int(spent * 1e6), MOST_US), len(group)
    found: list[bytes | Reply] = []
    for item, part, key in zip(group, parts, keys, strict=True):
        id_, attempt = item.request.id, item.request.attempt
        rows = item.request.rows if answer_rows else 0
        wait_us = min(int((started - item.received) * 1e6), MOST_US)
        # For who takes many answers it is the first and, with the END behind it, the only one.
        status = envelope.CHUNK if item.request.flags & envelope.STREAM else envelope.OK
        if sum(map(len, part)) > envelope.LARGE:
            reply = Reply(id_, status, attempt, 0, rows, wait_us, compute_us, shared, key, part)
            found.append(reply)
        else:
            times = {"wait_us": wait_us, "compute_us": compute_us, "shared": shared}
            found.append(envelope.reply_frame(id_, attempt, rows, key, part, status=status, **times))
    return found


def _keys(group: Sequence[Waited], tensors: tuple[Tensor, ...], parameters: dict[str, Any]) -> list[bytes]:
    """Return the key of each reply: the outputs, and its part of the answer's parameters."""
    if not parameters:
        return [envelope.result_key(tensors)] * len(group)
    divided = split_parameters(parameters, [item.request.rows for item in group])
    keys = [envelope.result_key(tensors, own) for own in divided]
    if (longest := max(map(len, keys))) > envelope.MAX_KEY:
        raise ModelFailed(
            f"names, shapes and parameters of an answer take {longest} bytes; the limit is {envelope.MAX_KEY}"
        )
    return keys


W = TypeVar("W", bound=Waited)


def divided(group: list[W]) -> tuple[list[W], list[W]]:
    """Of a call that failed: who is told so, and who is tried alone, since it may not have been his fault.

    One that was alone is told, and so is each that may not run twice: whatever the error, the model may have
    run.
    """
    if len(group) == 1:
        return group, []
    told = [item for item in group if not item.request.flags & envelope.RETRY_SAFE]
    return told, [item for item in group if item.request.flags & envelope.RETRY_SAFE]


def as_told(error: Exception, shared: int) -> TidegateError:
    """What the caller of a request is told that may not run again, after a call of ``shared`` requests."""
    if shared > 1:
        return ModelFailed(f"a call that it shared with others failed, and it may not run twice: {error}")
    return error if isinstance(error, TidegateError) else ModelFailed(str(error))


def measure(stats: WorkStats, group: Sequence[Waited], started: float, spent: float) -> None:
    """Take a call that went well into the statistics; times in seconds, ``started`` as ``received``."""
    requests, rows, waited = len(group), 0, 0.0
    for item in group:
        rows += item.request.rows or 1
        waited += started - item.received
    stats.tally.answered(requests, rows, waited, spent)
    stats.completed += requests
    stats.busy_s += spent
    stats.call_ms.add(spent * 1e3)
    stats.batch.add(requests)
    stats.rows.add(rows)
    CALL_SECONDS.observe(spent)
    CALL_SIZE.observe(requests)
