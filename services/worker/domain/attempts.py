"""How often a request may be tried when workers die under it."""

from __future__ import annotations

MAX_ATTEMPTS = 3

AGAIN = "again"
EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
GIVE_UP = frozenset({EXHAUSTED, NOT_RETRIED})


def next_step(attempt: int, *, safe: bool) -> str:
    """What becomes of a request that was lost in its ``attempt`` (0 is the first).

    Not every model may run twice (``safe`` False); and one that killed ``MAX_ATTEMPTS`` workers gets no more.
    """
    if not safe:
        return NOT_RETRIED
    return EXHAUSTED if attempt + 1 >= MAX_ATTEMPTS else AGAIN
