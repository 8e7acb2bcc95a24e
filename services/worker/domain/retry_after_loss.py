"""Decide how often a request may run if workers or model servers die while they run it.

If several requests were in the model, any of them may have caused the loss. So each of them runs again, alone
in the model. A loss is charged to a request only if the request ran alone. The number of an attempt means:

    0      the first attempt; other requests may run at the same time
    1      alone; no loss is charged to the request yet
    2      alone; one loss is charged, and after another loss the request is given up
"""

from __future__ import annotations

MAX_ATTEMPTS = 3

AGAIN = "again"
EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
GIVE_UP = frozenset({EXHAUSTED, NOT_RETRIED})


def after_loss(attempt: int, *, alone: bool, safe: bool) -> tuple[str, int]:
    """Return the decision on a request that was lost in ``attempt``, and the number of its next attempt.

    ``alone``: True if no other request was in the model. Then the loss counts against this request. ``safe``:
    True if the request may run twice.
    """
    if not safe:
        return NOT_RETRIED, attempt + 1
    if not alone:
        return AGAIN, max(attempt, 1)
    charged = max(attempt, 1) + 1
    return (EXHAUSTED if charged >= MAX_ATTEMPTS else AGAIN), charged
