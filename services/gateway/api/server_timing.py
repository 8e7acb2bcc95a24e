"""Encode the ``Server-Timing`` header: the time of each part of a request."""

from __future__ import annotations

from services.gateway.application.inference.core import InferenceResult


def server_timing(answer: InferenceResult, total: float) -> bytes:
    """Return the ``Server-Timing`` header of an answer. Its durations (in ms) add up to ``total``."""
    t = answer.timing
    return (
        b"decode;dur=%.3f, transit;dur=%.3f, wait;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f, total;dur=%.3f"
        % (t.decode * 1e3, t.transit(total) * 1e3, t.wait * 1e3, t.compute * 1e3, t.encode * 1e3, total * 1e3)
    )


def failure_timing(total: float) -> bytes:
    """Return the ``Server-Timing`` header of an error, which has only the total."""
    return b"transit;dur=%.3f, total;dur=%.3f" % (total * 1e3, total * 1e3)
