"""How often a request may be tried when workers or model servers die under it.

A loss convicts nobody while several requests may have caused it. So what was lost in company is tried again
with nothing beside it, and only a loss there is charged to the request. The number of the attempt says which:

    0      the first, in company
    1      alone, nothing is charged to it
    2      alone, one loss is charged to it; another one convicts it
"""

from __future__ import annotations

MAX_ATTEMPTS = 3

AGAIN = "again"
EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
GIVE_UP = frozenset({EXHAUSTED, NOT_RETRIED})


def after_loss(attempt: int, *, alone: bool, safe: bool) -> tuple[str, int]:
    """Return what becomes of a request that was lost in its ``attempt``, and the number of its next one.

    ``alone``: nothing else was in the model, so the loss is charged. Not every model may run twice (``safe``
    False).
    """
    if not safe:
        return NOT_RETRIED, attempt + 1
    if not alone:
        return AGAIN, max(attempt, 1)
    charged = max(attempt, 1) + 1
    return (EXHAUSTED if charged >= MAX_ATTEMPTS else AGAIN), charged
