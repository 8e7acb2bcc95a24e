"""Encode the ``Server-Timing`` header: the parts of a request's time."""

from __future__ import annotations

from services.gateway.application.access_log import LoggedAnswer


def server_timing(answer: LoggedAnswer, total: float) -> bytes:
    """Return the ``Server-Timing`` header of an answer.

    ``total``: the time of the request in seconds. The header has the parts of this time and the total, in ms.
    The parts add up to the total.
    """
    t = answer.timing
    return (
        b"decode;dur=%.3f, transit;dur=%.3f, wait;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f, total;dur=%.3f"
        % (t.decode * 1e3, t.transit(total) * 1e3, t.wait * 1e3, t.compute * 1e3, t.encode * 1e3, total * 1e3)
    )


def failure_timing(total: float) -> bytes:
    """Return the ``Server-Timing`` header of an error.

    ``total``: the time of the request in seconds. No part of it was measured, so all of it is ``transit``.
    """
    return b"transit;dur=%.3f, total;dur=%.3f" % (total * 1e3, total * 1e3)


def stream_timing(first: tuple[LoggedAnswer, float] | None, total: float) -> bytes:
    """Return the ``Server-Timing`` header of a stream.

    The header has the decode, wait and compute times of the first answer, the time until this answer arrived,
    and the total. ``first``: the first answer, and the seconds until it arrived; None if the stream had no
    answer. ``total``: the time of the request in seconds.
    """
    if first is None:
        return b"total;dur=%.3f" % (total * 1e3)
    answer, after = first
    t = answer.timing
    return b"decode;dur=%.3f, wait;dur=%.3f, compute;dur=%.3f, first;dur=%.3f, total;dur=%.3f" % (
        t.decode * 1e3, t.wait * 1e3, t.compute * 1e3, after * 1e3, total * 1e3,
    )  # fmt: skip
