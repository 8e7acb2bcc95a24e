"""How much work to hold, how many model calls to have in flight, and which way a call goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

IN_HAND_MS = 50.0
MAX_PREFETCH = 256
UNKNOWN_PREFETCH = 2
LIGHT_CALL_MS = 5.0
LIGHT_CALLS = 8
AHEAD_CALL_MS = 100.0
SLOW_LIMITS = 5


def calls_in_flight(*, instances: int, batches: bool, call_ms: float | None) -> int:
    """Model calls to have open at once.

    A model that batches gets one call for each instance: more calls only made smaller batches. Without
    batching, light calls overlap to hide the way to Triton and back; heavy ones do not, since what waits
    inside Triton is lost to other replicas.
    """
    if batches:
        return instances
    if call_ms is not None and call_ms < LIGHT_CALL_MS:
        return instances + LIGHT_CALLS
    return instances + 1


def at_once(
    *,
    instances: int,
    batch: int,
    call_rows: float | None,
    call_requests: float | None,
    open_calls: float | None,
    max_concurrency: int | None,
) -> float:
    """Requests that share the duration of one call when the model has all it can take.

    ``batch``: rows of a call, 0 without a batch axis; the others are recent means, None before anything was
    measured: rows and requests in a call, calls that were open while one was. Without a batch axis a call has
    one request, and its duration holds the wait inside Triton for the calls that are open beside it: by
    Little's law so many requests end in that time.
    """
    if batch:
        rows = max((call_rows or 1.0) / max(call_requests or 1.0, 1.0), 1.0)
        together = float(instances * max(1, int(batch / rows)))
    else:
        together = max(float(instances), open_calls or 1.0)
    return min(together, max_concurrency or together)


def prefetch(
    *,
    call_ms: float | None,
    batch_mean: float | None,
    frames_per_message: float,
    in_flight: int,
    company: int = 0,
    batch: int = 0,
) -> int:
    """Messages to hold unsettled: about ``IN_HAND_MS`` of expected work, at least one more than in flight.

    A fixed count would starve late workers on heavy models and idle on light ones. ``company``: requests
    that a call waits for; what it waits for must be able to come. ``batch``: requests that a call takes
    together; while calls run, the next one's must be able to gather, or a slow model that batches would
    never see more than two.
    """
    least = max(in_flight + 1, min(math.ceil(company / max(frames_per_message, 1.0)), MAX_PREFETCH))
    if call_ms is None or call_ms <= 0:
        return max(UNKNOWN_PREFETCH, least)
    least = max(least, math.ceil((in_flight + 1) * batch / max(frames_per_message, 1.0)))
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    messages = math.ceil(IN_HAND_MS / (request_ms * max(frames_per_message, 1.0)))
    return min(max(messages, least), MAX_PREFETCH)


def job_calls(in_flight: int) -> int:
    """Calls of jobs to have open at once: one place is kept for who waits for an answer, if there are two."""
    return max(1, in_flight - 1)


def jobs_ahead(calls: int, call_ms: float | None) -> int:
    """Groups of jobs to prepare while ``calls`` run: as many when calls are short, so that the model does
    not wait for the store; none when they are long, so that a job begins when it is said to.
    """
    return calls if call_ms is not None and call_ms < AHEAD_CALL_MS else 0


def job_prefetch(*, call_ms: float | None, batch_mean: float | None, calls: int, batch: int) -> int:
    """Jobs of a level to hold unsettled: those of the open calls, and of one more.

    Without that one more, a level of which a job runs would have none in hand when the next is chosen. A job
    that waits here behind a long one is lost to other replicas, so there is no more. A job is held through
    two visits to the store besides its call: short calls want more in hand than interactive requests do.
    """
    least = (calls + 1) * max(batch, 1)
    if call_ms is None or call_ms <= 0:
        return min(least, MAX_PREFETCH)
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    return min(max(math.ceil(2 * IN_HAND_MS / request_ms), least), MAX_PREFETCH)


def worth_changing(current: int, wanted: int) -> bool:
    """Whether a new consumer (the only way to change a prefetch) pays: a change by half or more."""
    return wanted >= current * 1.5 or wanted <= current / 1.5


@dataclass(slots=True)
class Mean:
    """Exponentially weighted mean; None until something was measured."""

    weight: float = 0.05
    value: float | None = None

    def add(self, sample: float) -> None:
        """Take a sample in; the first ones count in full."""
        self.value = sample if self.value is None else self.value + self.weight * (sample - self.value)


class Quickness:
    """Whether a model's calls are over before anybody could cancel one: their mean is below ``limit_s``.

    A call that took many times the limit, or was given up, is taken for what all of them take from now on,
    until enough others have shown that it was not. One that was refused, or failed, shows it by being slow,
    but never by being quick: the model may not have run.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._mean = Mean()

    @property
    def quick(self) -> bool:
        """False, too, before anything was measured."""
        return self._mean.value is not None and self._mean.value < self._limit_s

    def answered(self, spent_s: float) -> None:
        """A call had its answer after so long."""
        if spent_s < SLOW_LIMITS * self._limit_s:
            self._mean.add(spent_s)
        else:
            self.given_up(spent_s)

    def refused(self, spent_s: float) -> None:
        """A call had an error for an answer."""
        if self._mean.value is not None and spent_s > self._mean.value:
            self.answered(spent_s)

    def given_up(self, spent_s: float) -> None:
        """Nobody waited any longer for a call."""
        self._mean.value = max(self._mean.value or 0.0, spent_s, SLOW_LIMITS * self._limit_s)
