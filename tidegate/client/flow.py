"""The logic of calls, without I/O. So the blocking client and the asyncio client can share it.

A flow is a generator. It yields :class:`Send`, :class:`Sleep` or :class:`Alone`, receives the outcome, and
returns its result. A client drives the flow: it runs each yielded step, and sends the outcome into the flow.
If there is no answer, the client throws :class:`~tidegate.client.errors.Unreachable` or
:class:`~tidegate.client.errors.DeadlinePassed` into the flow. ``Client`` and ``AsyncClient`` differ only in
how they drive a flow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Any, TypeVar

from tidegate.client.errors import Unreachable, from_answer
from tidegate.kernel.errors import TidegateError

T = TypeVar("T")

FIRST_BACKOFF_S = 0.1
_AGAIN = frozenset({429, 503})
MAX_TIMEOUT_MS = 86_400_000  # the longest timeout that a gateway accepts


@dataclass(frozen=True, slots=True)
class Send:
    """One HTTP request; ``timeout_s`` limits the wait for its answer.

    With ``stream``, the body of a successful answer stays open, to be read piece by piece.
    """

    method: str
    path: str
    timeout_s: float
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause, in seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Alone:
    """A flow that a client runs under a lock, so that only one such flow runs at a time.

    Several threads or tasks can need the same data. The first one sends the request and caches the result.
    The others wait for the lock, and then use the cached result.
    """

    flow: Flow[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request. ``headers`` ignore the case of names.

    ``live``: the open HTTP response, if the request had ``stream``. The calling code must read and close it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    live: Any = None


# A flow receives an Answer for a Send, the result of the inner flow for an Alone, and None after a Sleep.
Step = Send | Sleep | Alone
Flow = Generator[Step, Any, T]


def driven(flow: Flow[T], do: Callable[[Step], object]) -> T:
    """Run a flow to its end, and return its result.

    ``do`` runs each step. An error of ``do`` is thrown into the flow.
    """
    try:
        step = next(flow)
        while True:
            try:
                result = do(step)
            except TidegateError as error:
                problem = error
            else:
                step = flow.send(result)
                continue
            step = flow.throw(problem)
    except StopIteration as done:
        value: T = done.value
        return value


@dataclass(frozen=True, slots=True)
class Caller:
    """A sender of requests with a deadline. It retries if that is safe and in time.

    It retries after a refused or broken connection, and after a 429 or 503 whose ``Retry-After`` ends before
    the deadline. It retries at most ``retries`` times. It never retries after a 500 or 504, because the model
    may have run. ``clock`` returns a time in seconds. ``chance`` returns a random number in [0, 1).
    """

    retries: int = 2
    clock: Callable[[], float] = monotonic
    chance: Callable[[], float] = random.random

    def call(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        content: bytes = b"",
        at_once: str = "",
        stream: bool = False,
        repeatable: bool = True,
    ) -> Flow[Answer]:
        """Send a request and return its answer. Raise the answer's error if the status is 400 or more.

        ``at_once``: an error with this reason is raised without a retry. ``stream``: leave the body open.
        ``repeatable``: if it is False, do not retry after a broken connection.
        """
        deadline = self.clock() + timeout_s
        for attempt in count():
            left = max(0.001, deadline - self.clock())
            left_ms = min(max(1, round(left * 1000)), MAX_TIMEOUT_MS)
            sent = {"X-Request-Timeout-Ms": str(left_ms), **(headers or {})}
            try:
                answer: Answer = yield Send(method, path, left, sent, content, stream)
                if answer.status < 400:
                    return answer
                error = from_answer(answer.status, answer.headers, answer.body)
                again = answer.status in _AGAIN and error.reason != at_once
                pause = self._pause(error, attempt) if again else None
            except Unreachable as lost:
                error, pause = lost, self._pause(lost, attempt) if repeatable else None
            if pause is None or attempt >= self.retries or self.clock() + pause >= deadline:
                raise error
            yield Sleep(pause)
        raise AssertionError("count() does not end")

    def _pause(self, error: TidegateError, attempt: int) -> float | None:
        """Return the seconds until the next attempt, or None for no retry.

        The seconds are partly random, so that not all clients retry at the same time.
        """
        if isinstance(error, Unreachable):
            return float(FIRST_BACKOFF_S * 2**attempt * (0.5 + 0.5 * self.chance()))
        if error.retry_after_s is None:
            return None
        return error.retry_after_s * (1 + 0.25 * self.chance())
