"""What a client wants done, without doing it.

A flow is a generator: it yields :class:`Send`, :class:`Sleep` or :class:`Alone`, is sent what came of it,
and returns its result. Where there is no answer, :class:`~tidegate.client.errors.Unreachable` or
:class:`~tidegate.client.errors.DeadlinePassed` is thrown into it. ``Client`` and ``AsyncClient`` differ only
in how they drive a flow.
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
MAX_TIMEOUT_MS = 86_400_000  # the longest that a gateway takes


@dataclass(frozen=True, slots=True)
class Send:
    """One HTTP request; ``timeout_s`` is how long to wait for its answer.

    ``stream``: the body of a good answer is left to be read piece by piece.
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
    """A flow to run while no other caller of this client is in one: so that many need not ask the same."""

    flow: Flow[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; ``headers`` look names up without regard to case.

    ``live``: the response whose body is still to be read and closed, for a request with ``stream``.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    live: Any = None


# What is sent back: an Answer for a Send, the result for an Alone, None after a Sleep.
Step = Send | Sleep | Alone
Flow = Generator[Step, Any, T]


@dataclass(frozen=True, slots=True)
class Caller:
    """Sends within a deadline, and again where that is safe and there is time for it.

    Sent again, at most ``retries`` times: what met no answer at all (connection refused or broken), and a
    429 or 503 whose ``Retry-After`` is before the deadline. Never a 500 or a 504: the model may have done
    the work.
    ``clock`` is in seconds, ``chance`` gives numbers in [0, 1).
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
        """The answer, if its status is below 400; else the error that it stands for is raised.

        ``at_once``: the reason of errors that are not sent again. ``stream``: the body is left to be read.
        ``repeatable``: whether a request whose connection broke may be sent again.
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
        """Seconds until the next try, spread so that many clients do not come back at once."""
        if isinstance(error, Unreachable):
            return float(FIRST_BACKOFF_S * 2**attempt * (0.5 + 0.5 * self.chance()))
        if error.retry_after_s is None:
            return None
        return error.retry_after_s * (1 + 0.25 * self.chance())
