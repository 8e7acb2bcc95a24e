"""Decide when a job calls its upstream again after the upstream did not answer. Pure."""

from __future__ import annotations

from services.worker.domain import llm_answers
from tidegate.kernel.protocol.llm import Meta

# HTTP statuses that mean that an upstream is away: it does not answer. A proxy in front of it may send them.
AWAY = frozenset({502, 504})


def pause_s(waited_s: float) -> float:
    """Return the seconds until the next call: a third of ``waited_s``, within two limits.

    The limits are ``llm_answers.PAUSES_S``.
    """
    first, longest = llm_answers.PAUSES_S
    return min(max(first, waited_s / 3), longest)


def pause_of_llm(meta: Meta, waited_s: float, wait_s: float) -> float | None:
    """Return the seconds until a language model's upstream is called again; None: never.

    ``meta``: the facts of the last answer. ``waited_s``: the seconds that the job has waited. A job waits at
    most ``wait_s`` seconds for an upstream that does not answer.
    """
    pause = pause_s(waited_s)
    return pause if meta.status in AWAY and waited_s + pause <= wait_s else None
