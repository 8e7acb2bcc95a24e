"""Choose the prefetch of a worker's consumers: the maximum number of unacked deliveries."""

from __future__ import annotations

import math

# A worker gets as many unacked messages as its calls can process in this many milliseconds.
IN_HAND_MS = 50.0
MAX_PREFETCH = 256
UNKNOWN_PREFETCH = 2


def prefetch(
    *,
    call_ms: float | None,
    batch_mean: float | None,
    frames_per_message: float,
    max_calls: int,
    awaited_batch: int = 0,
    max_batch: int = 0,
) -> int:
    """Return how many unacked request messages a worker should have: work for ``IN_HAND_MS``.

    A fixed number would be too small for quick models. For slow models it would be too large: a few workers
    would get all messages, and new workers would get none.

    The result has three lower limits. Each request is counted as one row here:

    - ``max_calls`` + 1 messages
    - the messages of ``awaited_batch`` rows, because a call waits until it has this many rows
    - if ``call_ms`` is known: the messages of ``max_calls`` + 1 full batches of ``max_batch`` rows. Without
      this limit, the batches of a slow model would never have more than two requests

    The result is at most ``MAX_PREFETCH``.
    """
    least = max(max_calls + 1, min(math.ceil(awaited_batch / max(frames_per_message, 1.0)), MAX_PREFETCH))
    if call_ms is None or call_ms <= 0:
        return max(UNKNOWN_PREFETCH, least)
    least = max(least, math.ceil((max_calls + 1) * max_batch / max(frames_per_message, 1.0)))
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    messages = math.ceil(IN_HAND_MS / (request_ms * max(frames_per_message, 1.0)))
    return min(max(messages, least), MAX_PREFETCH)


def consumer_prefetch(messages: int) -> int:
    """Return the prefetch: ``messages`` plus a quarter, but at least one more than ``messages``.

    Gateways publish no more requests than the workers should have, with one exception: if a caller is below
    its fair share, its request is published immediately. The additional messages are a margin for such
    requests. With this margin, the broker delivers them immediately, and the worker can run them before
    earlier requests.
    """
    return messages + max(1, messages // 4)


def without_margin(prefetch: int) -> int:
    """Undo :func:`consumer_prefetch`: return how many unacked messages a worker should have."""
    return max(1, prefetch - max(1, prefetch // 5))


def job_prefetch(*, call_ms: float | None, batch_mean: float | None, calls: int, max_batch: int) -> int:
    """Return how many unacked jobs of one priority level a worker should have.

    ``calls``: the most calls that jobs may use at the same time. The worker gets jobs for at least ``calls``
    + 1 calls. Without jobs for one more call, a level would have no job ready when the next call is chosen.

    If calls are long, the worker gets no more jobs than this, because another replica could run them sooner.
    If calls are short, it gets jobs for twice ``IN_HAND_MS`` of calls, because each job also needs two round
    trips to the store.

    The result is at most ``MAX_PREFETCH``.
    """
    least = (calls + 1) * max(max_batch, 1)
    if call_ms is None or call_ms <= 0:
        return min(least, MAX_PREFETCH)
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    return min(max(math.ceil(2 * IN_HAND_MS / request_ms), least), MAX_PREFETCH)


def worth_changing(current: int, desired: int) -> bool:
    """Return True if a prefetch changes so much that it is worth opening a new consumer."""
    return desired >= current * 1.5 or desired <= current / 1.5
