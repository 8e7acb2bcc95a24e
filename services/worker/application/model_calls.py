"""Create the replies of model calls, count the calls, and decide what happens after a failure.

Requests, jobs and streams use this module. If a model call raises an exception, only :func:`decide_failure`
decides what follows. If a request is lost, :mod:`services.worker.domain.retry_after_loss` decides whether it
runs again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from services.worker.adapters.call_traces import TRACES
from services.worker.adapters.metrics import CALL_SECONDS, CALL_SIZE
from services.worker.adapters.model_call import ModelAnswer
from services.worker.domain.split import RowMismatch, describe, split, split_parameters
from services.worker.domain.statistics import WorkStats
from tidegate.kernel import telemetry
from tidegate.kernel.errors import (
    BadRequest,
    DeadlinePassed,
    ModelFailed,
    PayloadTooLarge,
    TidegateError,
    Unavailable,
    UpstreamUnavailable,
)
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Request, Tensor

log = telemetry.logger(__name__)

# The largest number of microseconds that a reply frame can carry.
MAX_US = 2**32 - 1
LOGGED_IDS = 16


class Queued(Protocol):
    """A request of this worker; ``received`` is in seconds of the worker's monotonic clock."""

    request: Request
    received: float


Q = TypeVar("Q", bound=Queued)


@dataclass(frozen=True, slots=True)
class CallFailure(Generic[Q]):
    """The decision on each request of a model call that failed. Each request is in exactly one list.

    - ``lost``: the model server ended during the call. Any of these requests may have caused this.
    - ``expired``: the deadline has passed, so no caller waits any more.
    - ``failed``: the caller gets ``error``.
    - ``retried``: each of these requests runs again in a call of its own, and may succeed there.
    """

    error: TidegateError
    lost: Sequence[Q] = ()
    expired: Sequence[Q] = ()
    failed: Sequence[Q] = ()
    retried: Sequence[Q] = ()

    @property
    def waste(self) -> str:
        """Return the category under which the time of the call is counted as wasted."""
        if self.retried:
            return "retried"
        if self.lost:
            return "lost"
        return "expired" if self.expired else "failed"


# The error of an upstream runtime begins like this (`services/worker/runtimes/oip/upstream_http.py`). The
# pattern is compared only with the beginning of an error. An ordinary model may quote a caller's text further
# on in its error, and that text may contain the same words.
_UPSTREAM = re.compile(
    r"(?:Failed to process the request\(s\) for model (?:instance )?'[^']*', message: )?UpstreamUnavailable: "
)


def decide_failure(group: list[Q], error: Exception, unexpected: str) -> CallFailure[Q]:
    """Decide what happens to the requests of a call that raised ``error``.

    ``unexpected``: the beginning of the message to the caller if ``error`` is of an unexpected class.
    """
    match error:
        case Unavailable():
            return CallFailure(error, lost=group)
        case DeadlinePassed():
            return CallFailure(error, expired=group)
        case ModelFailed() if (begin := _UPSTREAM.match(error.message)) is not None:
            # Retries with single requests would fail at the same upstream.
            message = error.message[begin.end() :]
            return CallFailure(UpstreamUnavailable(f"the upstream is not available: {message}"), failed=group)
        case BadRequest() | ModelFailed() | PayloadTooLarge():
            reported: TidegateError = error
        case RowMismatch() | envelope.Undecodable():
            reported = ModelFailed(str(error))
        case _:
            # Requests also need an answer after an unexpected error. Otherwise they would stay unsettled
            # forever.
            ids = [telemetry.shown_id(item.request.trace) for item in group[:LOGGED_IDS]]
            log.error("a model call failed unexpectedly", exc_info=error, extra={"request_ids": ids})
            reported = ModelFailed(f"{unexpected}: {error!r}")
    if len(group) == 1:
        return CallFailure(reported, failed=group)
    # Any request of the call may have caused the error. So each request that may run twice is retried alone.
    # The other requests fail, because the model may already have run them.
    retried = [item for item in group if item.request.flags & envelope.RETRY_SAFE]
    failed = [item for item in group if not item.request.flags & envelope.RETRY_SAFE]
    shared = ModelFailed(
        f"a model call with several requests failed, and this request may not run twice: {reported.message}"
    )
    return CallFailure(shared, failed=failed, retried=retried)


def replies_to(
    group: Sequence[Queued], answer: ModelAnswer, started: float, spent: float
) -> list[bytes | Reply]:
    """Return a reply for each request of a call: a frame, or a :class:`Reply` if it is large.

    ``started``: the start of the call, in seconds of the worker's monotonic clock. ``spent``: the duration of
    the call, in seconds. Raises RowMismatch if the answer cannot be divided among the requests. Raises
    ModelFailed if a reply's key is too long for a frame.
    """
    outputs = answer.outputs
    rows = sum(item.request.rows for item in group)
    answer_rows, tensors = describe(outputs, rows)
    if len(group) == 1:
        parts = [[output.raw for output in outputs]]
    else:
        parts = split(outputs, [item.request.rows for item in group])
    keys = _reply_keys(group, tensors, answer.parameters)
    compute_us, shared = min(int(spent * 1e6), MAX_US), len(group)
    replies: list[bytes | Reply] = []
    for item, part, key in zip(group, parts, keys, strict=True):
        id_, attempt = item.request.id, item.request.attempt
        rows = item.request.rows if answer_rows else 0
        wait_us = min(int((started - item.received) * 1e6), MAX_US)
        # A request for a stream gets one CHUNK here; its END is sent after that.
        status = envelope.CHUNK if item.request.flags & envelope.STREAM else envelope.OK
        if sum(map(len, part)) > envelope.LARGE:
            reply = Reply(id_, status, attempt, 0, rows, wait_us, compute_us, shared, key, part)
            replies.append(reply)
        else:
            times = {"wait_us": wait_us, "compute_us": compute_us, "shared": shared}
            replies.append(envelope.reply_frame(id_, attempt, rows, key, part, status=status, **times))
    return replies


def _reply_keys(
    group: Sequence[Queued], tensors: tuple[Tensor, ...], parameters: dict[str, Any]
) -> list[bytes]:
    """Return the key of each reply.

    A key describes the reply's outputs, and contains the reply's part of the answer's parameters.
    """
    if not parameters:
        return [envelope.result_key(tensors)] * len(group)
    shares = split_parameters(parameters, [item.request.rows for item in group])
    keys = [envelope.result_key(tensors, share) for share in shares]
    check_key_length(max(map(len, keys)))
    return keys


def check_key_length(length: int) -> None:
    """Raise ModelFailed if a reply's key of ``length`` bytes is too long for a frame."""
    if length > envelope.MAX_KEY:
        raise ModelFailed(
            f"the names, shapes and parameters of an answer have {length} bytes, but the limit is "
            f"{envelope.MAX_KEY} bytes"
        )


def count_success(stats: WorkStats, group: Sequence[Queued], started: float, spent: float) -> None:
    """Count a successful call in the statistics.

    :func:`replies_to` explains ``started`` and ``spent``. A copy for shadow traffic never shares a call with
    other requests. It changes the averages and the call metrics. It does not count as load, because a copy
    should not cause the start of a replica.
    """
    requests, rows, waited = len(group), 0, 0.0
    for item in group:
        rows += item.request.rows or 1
        waited += started - item.received
    copies = group[0].request.flags & envelope.COPY
    if not copies:
        stats.counts.add_success(requests, rows, waited, spent)
        stats.completed += requests
        stats.busy_s += spent
    stats.call_ms.add(spent * 1e3)
    stats.batch.add(requests)
    stats.rows.add(rows)
    CALL_SECONDS.observe(spent)
    CALL_SIZE.observe(requests)
    if TRACES.on and not copies:
        TRACES.called(group, started, spent)


def count_slot_success(stats: WorkStats, slots: int, item: Queued, started: float, spent: float) -> None:
    """Update the statistics after a request or job has run in a slot of a decoupled model.

    ``slots``: the number of slots. Up to ``slots`` requests run at the same time, so each adds its duration
    divided by ``slots`` to the busy time. ``stats.call_ms`` stays unknown, because a stream's duration does
    not predict when its first chunk comes.
    """
    stats.completed += 1
    stats.busy_s += spent / slots
    stats.batch.add(slots)
    stats.counts.add_success(1, item.request.rows or 1, started - item.received, spent)
    if TRACES.on:
        TRACES.called([item], started, spent)


def count_stream_time(stats: WorkStats, mark: int, item: Queued, outcome: str | CallFailure[Any]) -> None:
    """Add the time since ``mark`` to the answered time or to the wasted time.

    ``mark``: the start of the call, as ``stats.time.begin`` returned it. ``item``: a stream, or a request to
    a language model. ``outcome``: the outcome that ``send_answers`` returned.
    """
    if outcome == "ok":
        stats.time.answered(mark, [item])
    else:
        stats.time.waste(mark, outcome.waste if isinstance(outcome, CallFailure) else outcome)


def count_failure(stats: WorkStats, item: Queued) -> None:
    """Count a failed request in the statistics. Ignore a copy for shadow traffic."""
    if item.request.flags & envelope.COPY:
        return
    stats.failed += 1
    spent = time.monotonic() - item.received
    stats.counts.add_failure(1, spent)
    if TRACES.on:
        TRACES.called([item], item.received, spent, "failed")
